"""Logits of an exported model by its target's loader alone: a script for a separate process.

    python -P logits.py LOADER MODEL IDS LOGITS

LOADER is transformers, remote-code (transformers with trust_remote_code), pyprune (its registered classes) or gguf
(llama.cpp). IDS is a safetensors file with `ids`, int64 [1, tokens]; LOGITS gets `logits`, float32 [tokens,
vocabulary], computed in float32 on the CPU. The first two must work without pyprune, so nothing here imports it.
"""

import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

PARENT = "PYPRUNE_VERIFY_PARENT"  # environment: the process that waits for this one


def end_with_parent() -> None:
    """Have Linux kill this process once the one that started it is gone, however that ended. Elsewhere nothing."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before we asked
        os._exit(1)


if __name__ == "__main__":
    end_with_parent()  # before the seconds that the next imports take

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402


def logits_transformers(model: str, ids: Tensor, trust_remote_code: bool) -> Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
    auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    # Attention by transformers' default: sdpa, eager for classes that have no sdpa.
    loaded, loading = auto.from_pretrained(
        model,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    # transformers makes up what is missing and drops what it does not know, with no more than a line of its log.
    for problem in ("missing_keys", "unexpected_keys"):
        if loading[problem]:
            sys.exit(f"{problem}: {', '.join(sorted(loading[problem]))}")
    with torch.inference_mode():
        return loaded.eval()(input_ids=ids, use_cache=False).logits[0]


def logits(loader: str, model: str, ids: Tensor) -> Tensor:
    """[1, tokens] -> [tokens, vocabulary] float32."""
    if loader == "gguf":
        check: Any = importlib.import_module("pyprune.evaluation.llama_cpp")
        return check.logits_gguf(Path(model), ids[0].tolist())
    if loader == "pyprune":
        importlib.import_module("pyprune")
    found = logits_transformers(model, ids, loader == "remote-code")
    if loader != "pyprune" and "pyprune" in sys.modules:
        sys.exit("pyprune was imported, so this is no proof that the model loads without it")
    return found


if __name__ == "__main__":
    _, given_loader, given_model, given_ids, target = sys.argv
    result = logits(given_loader, given_model, load_file(given_ids)["ids"])
    save_file({"logits": result.float().contiguous()}, target)
