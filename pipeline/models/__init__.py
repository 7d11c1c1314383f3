"""A network: its architecture, its files, what it takes and what it answers.

All that inference needs, and so all that training needs beside learning. A change here makes every stage stale that runs a
network. How a network learns belongs to `learning`.
"""
