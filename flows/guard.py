"""Run a command and leave nothing of it behind: `python guard.py SECONDS COMMAND...`.

The command runs in a session of its own. It is over when standard input closes, because the flow was cancelled or
its process killed, and when the command itself ends. Every process that is left of the session is then asked to end, and killed
after SECONDS.
Nothing of winnow or of Prefect is imported here, so it starts in some milliseconds and outlives its parent's crash.

Exits as the command did; 128 + n when signal n ended it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time


def main(grace: float, command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    ending = threading.Lock()

    def end_group() -> None:
        with ending, contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline:
                os.killpg(child.pid, 0)  # raises once nobody is left
                time.sleep(0.02)
            os.killpg(child.pid, signal.SIGKILL)

    def wait_for_parent() -> None:
        while os.read(0, 4096):
            pass
        end_group()

    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end_group).start())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait_for_parent, daemon=True).start()
    code = child.wait()
    end_group()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(float(sys.argv[1]), sys.argv[2:]))  # the thread that reads standard input must not delay it
