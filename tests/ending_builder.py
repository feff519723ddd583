"""In place of the builder's process, for tests of how its end is explained: says and does what the job tells."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
sys.stderr.write(job["stderr"])
sys.stdout.write(job["stdout"])
sys.stdout.flush()
sys.stderr.flush()
if job["ends"] < 0:
    signal.signal(-job["ends"], signal.SIG_DFL) if -job["ends"] != signal.SIGKILL else None
    os.kill(os.getpid(), -job["ends"])
os._exit(job["ends"])
