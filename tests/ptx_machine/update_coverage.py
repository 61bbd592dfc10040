"""Makes the runs that coverage.json doesn't have yet, and writes the table of all into README.md. `--all` makes all runs anew.
Other arguments are pytest's: `-k "RMSNorm and sm_90"` makes those of one layer alone."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ptx_machine import bridge, coverage  # noqa: E402

every = "--all" in sys.argv
chosen = [argument for argument in sys.argv[1:] if argument != "--all"]
with tempfile.TemporaryDirectory() as folder:
    environment = bridge.environment(Path(folder)) | {"FASTLAYERS_COVERAGE": "update" if every else "missing"}
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen, str(HERE / "kernels.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, env=environment, check=False)
nothing_to_do = 5  # as pytest says it
readme = HERE / "README.md"
marked = f"<!-- coverage -->\n{coverage.table()}\n<!-- end -->"
readme.write_text(re.sub(r"(?s)<!-- coverage -->.*<!-- end -->", lambda _: marked, readme.read_text()))
sys.exit(0 if done.returncode == nothing_to_do else done.returncode)
