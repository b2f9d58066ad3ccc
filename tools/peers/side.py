"""A process that does jobs: one a line in, one a line out, both JSON."""

import json
import os
import subprocess
import sys


class Side:
    def __init__(self, *command):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        quiet = None if os.environ.get("MEMPO_BENCH_DEBUG") else subprocess.DEVNULL
        self.process = subprocess.Popen([str(part) for part in command], stderr=quiet, **pipes)

    def do(self, job, **arguments):
        self.process.stdin.write(json.dumps({"job": job, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"`{' '.join(self.process.args)}` ended at {job}; MEMPO_BENCH_DEBUG=1 shows its words")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
