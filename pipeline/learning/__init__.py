"""How a network learns: the loop (a room of its own, `loop`), the views it sees, and a file for each kind of lesson.

`losses` and `teachers` for soft labels, `contrastive` for images without labels. A stage depends on the lessons that it uses,
so a new one makes nothing stale. What is measured afterwards belongs to `report`.
"""
