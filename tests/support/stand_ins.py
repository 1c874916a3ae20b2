"""Scripts of a test's own in the place of stage.py, judge.py and prepare_data.py: they import the real one and replace
parts of it.

`stage`, `judge` and `data` write such a script into a folder and return what is to be given to the harness (see
given.py), so that this script is mounted instead, with the real one beside it. `one_run` is given where no verb is to
run.
"""

from __future__ import annotations

from pathlib import Path

from repository import ROOT

STAGE = """
import io, json, os, signal, sys, threading, time, traceback
os.write(1, b'{{"up": true}}\\n')
sys.path.insert(0, "/real")
import stage
threading.Thread(target=stage.end_when_alone, daemon=True).start()
{changes}
stage.main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
os._exit(0)
"""
JUDGE = """
import sys
sys.path.insert(0, "/real")
import judge
import numpy as np
sys.modules["__main__"] = judge  # as if it ran by itself
{changes}
judge.main(*sys.argv[1:])
"""
PREPARE_DATA = """
import dataclasses, sys
sys.path[:0] = ["/real", "/repo/container/data_sets", "/repo/container/harness"]
import prepare_data
{changes}
sys.exit(prepare_data.main(sys.argv[1:]))
"""
GIVEN = """
measure.{constant} = measure.Path({script!r})
measure.{stage}_mounts = lambda *job, mounts=measure.{stage}_mounts: {{
    **mounts(*job), "/real/{stage}.py": measure.INSIDE / "{stage}.py"
}}
"""
GIVEN_PREPARE_DATA = """
import dataclasses
dataset.PREPARE = measure.Path({script!r})
engine.arguments = lambda c, arguments=engine.arguments: arguments(
    dataclasses.replace(c, mounts={{**c.mounts, "/real/prepare_data.py": measure.Path({real!r})}}) if c.writable else c
)
"""
# What training leaves, out.tar, is there already: a measurement begins with embedding it.
NO_TRAINING = """
def train(self):
    for side in measure.SIDES:
        self.start(side, measure.EMBED_S, measure.side_mounts(self.job, side))
    self.report, self.ready = {"seconds": 0.0}, measure.time.monotonic()
measure.Measurement.train = train
"""


def stage(folder: Path, changes: str) -> str:
    """changes: Python that replaces parts of the module `stage`, in every sandbox that runs train.py."""
    script = write(folder / "given_stage.py", STAGE, changes)
    return GIVEN.format(constant="STAGE", stage="stage", script=script)


def judge(folder: Path, changes: str) -> str:
    """changes: Python that replaces parts of the module `judge`."""
    script = write(folder / "given_judge.py", JUDGE, changes)
    return GIVEN.format(constant="JUDGE", stage="judge", script=script)


def data(folder: Path, changes: str) -> str:
    """changes: Python that replaces parts of the module `prepare_data`."""
    (place := folder / "prepare").mkdir()
    (place / "container").symlink_to(ROOT / "container")
    script = write(place / "prepare_data.py", PREPARE_DATA, changes)
    return GIVEN_PREPARE_DATA.format(script=script, real=str(ROOT / "prepare_data.py"))


def write(file: Path, script: str, changes: str) -> str:
    """Returns its path."""
    file.write_text(script.format(changes=changes))
    file.chmod(0o644)
    return str(file)


def one_run(**fields) -> str:
    """Instead of a verb: measure.run(measure.Job(**fields)), with the image that there is; prints its Run as JSON."""
    return f"""
import dataclasses, json
from pathlib import PosixPath
print(json.dumps(dataclasses.asdict(measure.run(measure.Job(**{fields}, image=engine.find_image())))))
raise SystemExit
"""
