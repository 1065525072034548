from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).with_name("rama-ebpf"))
ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD={at}; COMP_LINE="{words}"; COMP_POINT=${{#COMP_LINE}}
function=$(complete -p rama-ebpf | sed -E 's/.*-F ([^ ]+).*/\\1/')
$function rama-ebpf "{last}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "offered"),
    [("rama-ebpf blo", {"block"}), ("rama-ebpf block --rea", {"--reason"}), ("rama-ebpf guard --fai", {"--failsafe"})],
)
def test_bash_completes_commands_and_options(words: str, offered: set[str], tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(subprocess.run([COMMAND, "complete", "bash"], check=True, capture_output=True, text=True).stdout)
    parts = words.split()
    ask = ASK.format(script=script, words=words, at=len(parts) - 1, last=parts[-1])
    answer = subprocess.run(["bash", "-c", ask], check=True, capture_output=True, text=True, timeout=60)
    assert set(answer.stdout.split()) == offered
