"""Stand-ins for git and the engine that count what run.sh calls and, at one call, end it: before, after or inside.

At one call they can also do what a user does meanwhile (a script), or refuse with the status `whom`, as an engine may.

They stand first in the PATH of a run that is given them. A call that is not armed is replaced by the real program
(exec), so that what runs has the process tree it has without us.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from repository import PATH

STAND_IN = r"""#!/bin/bash
shopt -s extglob
real=@REAL@ dir=@DIR@
exec 8>>"$dir/calls"
flock 8
words="@NAME@ $*"
printf '%s\n' "${words//$'\n'/ }" >&8
n=$(wc -l <"$dir/calls")
exec 8>&-
read -r at side whom delay <"$dir/armed"
[[ $n == "$at" || $words == *" --name ar-"+([0-9-])"-$at "* ]] || exec "$real" "$@"
touch "$dir/fired"
end() { if [[ $whom == group ]]; then kill -9 -- "-$HARNESS_PID"; else kill -9 "$HARNESS_PID"; fi; }
case $side in
  before) end; exit 1 ;;
  after) "$real" "$@"; status=$?; end; exit "$status" ;;
  # the first byte it writes to a file is a deadly signal that git does not catch: its locks and halves stay behind
  inside) (ulimit -c 0 -f 0; exec "$real" "$@"); end; exit 1 ;;
  full) (ulimit -c 0 -f 0; exec "$real" "$@"); exit ;; # that alone: a disk that is full just then
  meanwhile) # where a user would be; containers start in a folder of their own
    at_the_top='cd "$(git rev-parse --show-toplevel)"; . "$0"'
    env -i HOME="${HOME-}" PATH="${PATH#*:}" bash -ec "$at_the_top" "$dir/meanwhile" >&2
    exec "$real" "$@"
    ;;
  refused) exit "$whom" ;;
esac
# the client or its container alone, some time after it has started
exec 3<&0 </dev/null
"$real" "$@" <&3 3<&- &
exec 3<&-
sleep "$delay"
name=${words#* --name }
if [[ $side == client ]]; then kill -9 "$!"; else "$real" kill "${name%% *}" >/dev/null 2>&1; fi
wait "$!"
"""
WRITES = ("hash-object -w", "update-ref", "update-index", "read-tree", "write-tree", "commit-tree")


class Shims:
    """Stand-ins in a folder; `armed` and `calls` there are what they read and write."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name in ("git", "podman", "docker"):
            if real := shutil.which(name):
                text = STAND_IN.replace("@REAL@", real).replace("@DIR@", str(folder)).replace("@NAME@", name)
                (folder / name).write_text(text)
                (folder / name).chmod(0o755)
        self.arm()

    @property
    def given(self) -> str:
        """To be given to runs. Pictures in the background make calls at any time, so they are not drawn."""
        return f"""
import os
os.environ.update(PATH={f"{self.folder}:{PATH}"!r}, HARNESS_PID=str(os.getpid()))
experiment.refresh_report = lambda: None
"""

    def arm(self, call: int | str = 0, side: str = "", whom: str = "", delay: float = 0) -> None:
        """At this call, or never: its number from 1, or the stage of a container. whom: self or group."""
        (self.folder / "calls").write_text("")
        (self.folder / "fired").unlink(missing_ok=True)
        (self.folder / "armed").write_text(f"{call} {side or '-'} {whom or '-'} {delay}\n")

    def fired(self) -> bool:
        """Whether it was called there since arm()."""
        return (self.folder / "fired").exists()

    def calls(self) -> list[str]:
        """What was called since arm(), without what differs from run to run."""
        lines = (self.folder / "calls").read_text().splitlines()
        lines = [re.sub(r"[0-9a-f]{12,64}|(?<=ar-)[\d-]+(?=-)", "*", line) for line in lines]
        return [re.sub(r"(-c \S+ )+(--no-pager )?|--runtime runc ", "", line) for line in lines]


def writes(call: str) -> bool:
    return call.startswith("git ") and any(word in call for word in WRITES)
