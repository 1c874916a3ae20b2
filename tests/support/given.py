"""Runs a verb of the harness with some of its parts given by a test, instead of editing its source.

usage: python3 -I -B given.py ROOT/container/harness SCRIPT VERB...

SCRIPT is Python that runs before the verb, with the harness's modules at hand: `measure.EMBED_S = 5`,
`measure.fresh_seed = lambda: 7`, `git.GIT = (...)`. The environment is the caller's own: see Project.run.
"""

import runpy
import sys
from pathlib import Path

sys.dont_write_bytecode = True
harness, script, *words = sys.argv[1:]
sys.path.insert(0, harness)
modules = {file.stem: __import__(file.stem) for file in Path(harness).glob("*.py") if file.stem != "__main__"}
exec(compile(script, "given by the test", "exec"), modules)
sys.argv = [harness, *words]
runpy.run_path(f"{harness}/__main__.py", run_name="__main__")
