"""Whether numbers are right and mistakes are sentences: architectures, chat templates, odd inputs.

    python benchmarks/correctness.py
    python benchmarks/correctness.py --quick --json figures.json
    python benchmarks/correctness.py --only architectures --match gemma
    python benchmarks/correctness.py --only fuzz --match runs --keep leaks

Needs hypothesis and, for chat templates, trl. Nothing is fetched; all models are tiny and random.

Architectures: log-probabilities against plain transformers and against PEFT over the exported
folder, one answer at a time without padding, and the adapter's gradient against PEFT's. Right is
also a refusal (UserError) where the table of architectures below gives a reason for one. In
bfloat16 the error of the same arithmetic without fedpref, against float32, stands beside ours.

Templates: the tokens of prompts and answers against those of the text that the template writes,
the same on any day. Right is also a refusal, or a warning that shows the lost text where a template
writes a turn otherwise once it is answered, as long as no message of the prompt is lost.

Fuzz: rows, configs, overrides and damaged run directories, through what the commands `check`,
`report`, `compare`, `resume`, `evaluate` and `generate` call. A leak is an exception other than
UserError, more than five seconds, a value of the environment in an experiment's own YAML, or such
a YAML that is not taken back. `--keep` stores what leaked, to be tried on the command line there:

    cd leaks
    fedpref check configs-0008.yaml
    fedpref check base-3.yaml KEY=VALUE    # the lines of overrides-0056.txt
    fedpref check base-0.yaml data.path=rows-0022.jsonl
    fedpref report runs-0062               # or compare, resume, evaluate, generate

Figures: `architectures_tried` and `architectures_right`, `largest_logprob_error` and
`largest_logprob_error_bf16`, `templates_tried` and `templates_right_or_refused`, `fuzz_tried` and
`fuzz_leaks`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # BitNet's layer compiles itself

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

from correct.architectures import measure_architectures
from correct.odd_inputs import measure_fuzz
from correct.templates import measure_templates
from ending import end_with_children

PARTS = ("architectures", "templates", "fuzz")


def measure(part: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Measure one part in this process."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of PEFT and of the padded form, which the table shows
    if part == "architectures":
        return measure_architectures(arguments.match, scratch)
    if part == "templates":
        return measure_templates(arguments.match, scratch)
    count = 500 if arguments.quick else 3000
    return measure_fuzz(arguments.match, scratch, count, arguments.keep)


def in_process_of_its_own(part: str, words: Sequence[str]) -> dict[str, float]:
    """Measure one part in a process of its own; print what it prints when it is over."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, *words, "--only", part, "--json", str(file)],
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = time.perf_counter() - begun
        print(f"\n== {part}, {seconds:.0f} s\n{done.stdout}", flush=True)
        if done.returncode:
            raise SystemExit(f"{part}: the process ended with code {done.returncode}")
        figures: dict[str, float] = json.loads(file.read_text())
        return figures


def main() -> None:
    """Print the tables and write the figures to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="500 odd inputs in place of 3,000")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument(
        "--match", default="", help="with --only: names, or kinds of input, that hold this text"
    )
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that leak")
    arguments = parser.parse_args()
    end_with_children()
    goal = arguments.json.resolve() if arguments.json else None  # fuzz works in another folder
    if arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(arguments.only, arguments, Path(folder))
    else:
        words = ["--quick"] * arguments.quick
        words += ["--keep", str(arguments.keep)] if arguments.keep else []
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(lambda part: in_process_of_its_own(part, words), PARTS[::-1])
            figures = {name: value for part in parts for name, value in part.items()}
    print(json.dumps(figures, indent=1))
    if goal:
        goal.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
