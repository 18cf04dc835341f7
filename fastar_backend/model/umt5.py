"""Prompts of the Wan2.1 family: embedded by umT5's encoder, once a prompt.

umT5-xxl's encoder has 5.7 billion parameters and works once a prompt, so it need not stay in memory."""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.errors import WeightsError
from fastar_backend.model.weight_files import first_line, locate

REMEMBERED = 64  # prompts
_FILES = ("config.json", "model*.safetensors", "model*.safetensors.index.json", "tokenizer*", "spiece.model",
          "special_tokens_map.json")  # fmt: skip
_PATTERNS = (*_FILES, *(f"text_encoder/{name}" for name in _FILES), *(f"tokenizer/{name}" for name in _FILES))
_ALLOWED = "a folder or hub id with umT5's encoder in safetensors (text_encoder/) and its tokenizer (tokenizer/)"


class UMT5Text:
    """Callable: prompts -> embedded prompts. The last 64 prompts are remembered, without their padding."""

    def __init__(
        self, source: str, length: int = 512, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        *, release: bool = True,
    ) -> None:  # fmt: skip
        """source: a local folder or a hub id, as in `load_transformer`, in diffusers' layout (folders text_encoder and
        tokenizer, e.g. of Wan-AI/Wan2.1-T2V-1.3B-Diffusers) or with both in one folder. length: tokens of an embedded
        prompt. release: the encoder's weights are in memory only while prompts are embedded, and read anew from disk
        for the next ones; else they stay from the first prompt on. Raises WeightsError."""
        self.length, self.device, self.dtype, self.release = length, torch.device(device), dtype, release
        try:
            import ftfy
            import transformers
        except ImportError as error:
            raise WeightsError(
                f"text: {error.name} is not installed; allowed: pip install 'fastar-serve[wan]'"
            ) from None
        self._fix, self._library = ftfy.fix_text, transformers
        self._source = source
        folder = locate(source, _PATTERNS)
        self._encoder_folder = _inside(folder, "text_encoder")
        try:
            config = transformers.AutoConfig.from_pretrained(self._encoder_folder, local_files_only=True)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                _inside(folder, "tokenizer"), local_files_only=True
            )
        except Exception as error:  # of transformers, tokenizers (a bare Exception) and the hub's client
            raise self._unreadable(error) from None
        if config.model_type != "umt5":
            raise WeightsError(f"text: {source} is a {config.model_type!r:.40} model; allowed: {_ALLOWED}")
        self.dim: int = config.d_model  # must be the transformer's text_dim
        self._encoder: Any = None
        self._known: OrderedDict[str, Tensor] = OrderedDict()  # cleaned prompt -> [tokens, dim], oldest use first

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """[prompts, length, dim], zero beyond each prompt's tokens; longer prompts are cut off. Raises WeightsError."""
        texts = [self.clean(prompt) for prompt in prompts]
        embedded = {text: self._known[text] for text in texts if text in self._known}
        try:
            for text in texts:
                if text not in embedded:
                    embedded[text] = self._embed(text)
        finally:
            if self.release:
                self._encoder = None
        for text in texts:
            self._known[text] = embedded[text]
            self._known.move_to_end(text)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return torch.stack([F.pad(embedded[text], (0, 0, 0, self.length - len(embedded[text]))) for text in texts])

    def clean(self, prompt: str) -> str:
        """As Wan does it: broken Unicode and typographic quotes mended, HTML entities decoded (twice), white space
        collapsed."""
        return re.sub(r"\s+", " ", html.unescape(html.unescape(self._fix(prompt)))).strip()

    def _embed(self, text: str) -> Tensor:
        """[tokens, dim]. Alone and without padding, which umT5 masks: the same numbers as with it, for less."""
        if self._encoder is None:
            self._encoder = self._load()
        tokens = self._tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt")
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        return self._encoder(ids, mask).last_hidden_state[0].to(self.dtype)

    def _load(self) -> Any:
        log = self._library.utils.logging
        bars = log.is_progress_bar_enabled()
        log.disable_progress_bar()  # on a server's standard error
        try:
            encoder, report = self._library.UMT5EncoderModel.from_pretrained(
                self._encoder_folder, dtype=self.dtype, use_safetensors=True, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise self._unreadable(error) from None
        finally:
            if bars:
                log.enable_progress_bar()
        if missing := sorted(report["missing_keys"]):
            raise WeightsError(
                f"text: {self._source} lacks {len(missing)} tensors: {'; '.join(missing[:8])}; allowed: {_ALLOWED}"
            )
        return encoder.to(self.device).eval()

    def _unreadable(self, error: Exception) -> WeightsError:
        return WeightsError(f"text: cannot read {self._source} ({first_line(error)}); allowed: {_ALLOWED}")


def _inside(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder
