"""run.yaml in the output: the options that repeat the run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..calibration.mixture import words_of
from ..checkpoint import SHARD_SIZE
from ..checkpoint.model_in_memory import IN_MEMORY

if TYPE_CHECKING:
    from .job import Job

FILE = "run.yaml"
# Paths stand as they were given, as in plan.json: an output that is handed on does not name its maker's folders.
HEAD = """\
# The options of this run. Repeat it from the same folder, since paths stand as they were given:
#     pyprune prune --config {file} NEW_OUTPUT
"""


def write_run_file(job: "Job", folder: Path) -> None:
    text = yaml.safe_dump(run_options(job), sort_keys=False, allow_unicode=True, width=10**6)
    (folder / FILE).write_text(HEAD.format(file=FILE) + text, encoding="utf-8")


def run_options(job: "Job") -> dict[str, Any]:
    """Options by the names of the command line, resolved: device, type, lengths and the method's defaults.

    What has no name there is left out: a model in memory, documents, token ids.
    """
    own, evaluation, target = job.options, job.options.evaluation, job.options.target
    found: dict[str, Any] = {"model": None if own.model.endswith(IN_MEMORY) else own.model, "method": job.method.name}
    if target is None:
        found["ratio"] = own.ratio
    else:
        found[target.flag.removeprefix("--")] = target.amount
    found |= {name.replace("_", "-"): value for name, value in job.method.options.items()}
    if job.method.needs_text:
        found["calibration"] = words_of(own.calibration)
        found["text-column"] = own.text_column
        found["packing"] = own.packing
    found |= {
        "samples": own.samples,
        "sequence-length": own.sequence_length,
        "seed": own.seed,
        "device": job.device.type,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device-memory": own.device_memory,
        "shard-size": None if own.shard_size == SHARD_SIZE else own.shard_size,
        "allow-nonfinite": own.allow_nonfinite or None,
        "trust-remote-code": own.trust_remote_code or None,
        "verify": own.verify,
    }
    if evaluation is not None and isinstance(evaluation.text, str):
        found |= {
            "evaluate": evaluation.text,
            "evaluation-length": evaluation.sequence_length,
            "max-windows": evaluation.max_windows,
        }
    return {name: value for name, value in found.items() if value is not None}
