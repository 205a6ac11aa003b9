"""Weight files that stay on the Hub: ranges of their bytes are requested, tensor by tensor.

`huggingface_hub` makes the requests: its address of a file, its session with endpoint, proxies and token, its
errors, and its repetition of requests that fail on the way. It is imported inside the functions: the
command's `--help` must not wait for it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import HubError
from ..options import switched
from .hub_errors import explain
from .safetensors_file import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of one request: a connection that drops costs so many at most.
PART = 1 << 26


@dataclass
class _Version:
    """What the Hub says of a file whenever a part of it arrives."""

    num_bytes: int
    etag: str | None


@dataclass
class RemoteWeights:
    """The safetensors files of a commit of a Hub repository.

    Attributes:
        source: the Hub id.
        revision: the commit, so that a branch that moves meanwhile changes nothing.
        offsets: name of a tensor in its file -> (begin, end) in the file's data.
        token: Hub token.
    """

    source: str
    revision: str
    offsets: dict[str, tuple[int, int]]
    token: str | None = field(default=None, repr=False)
    _versions: dict[str, _Version] = field(default_factory=dict, repr=False)
    _starts: dict[str, int] = field(default_factory=dict, repr=False)

    def read(self, info: TensorInfo, stored: str) -> Tensor:
        """One tensor, in memory of its own.

        Args:
            info: its dtype, shape and file.
            stored: its name in the file.

        Raises:
            HubError: the Hub refuses or cannot be reached, or the file is not what it was.
        """
        import torch

        begin, end = self.offsets[stored]
        start = self._start(info.file)
        data = torch.empty(end - begin, dtype=torch.uint8)
        array: Any = data.numpy()
        view = memoryview(array)
        for first in range(0, len(view), PART):
            part = view[first : first + PART]
            part[:] = self._range(info.file, start + begin + first, len(part))
        return data.view(getattr(torch, info.dtype)).reshape(info.shape)

    def _start(self, file: str) -> int:
        """Where the data of a file begin: behind the header, whose length is its first 8 bytes."""
        if file not in self._starts:
            self._check_ranges(file)
            (length,) = struct.unpack("<Q", self._range(file, 0, 8))
            self._starts[file] = 8 + length
        return self._starts[file]

    def _check_ranges(self, file: str) -> None:
        """Raises HubError for a file that is sent as a whole only, before its body is read."""
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        try:
            with http_stream_backoff("GET", **self._request(file, 0, 8)) as response:
                hf_raise_for_status(response)
                is_part = response.status_code == 206 and _range_of(response.headers) is not None
        except Exception as exc:
            raise explain(exc, self.source, self.revision) from exc
        if not is_part:
            raise self._no_ranges(file)

    def _no_ranges(self, file: str) -> HubError:
        return HubError(
            f"the Hub sends '{file}' of '{self.source}' as a whole only, expected a range of its bytes: "
            f"leave out {switched('stream')}"
        )

    def _request(self, file: str, first: int, count: int) -> dict[str, Any]:
        """What a request for `count` bytes of a file says, beside its method."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(token=self.token, library_name="mpoe-convert")
        headers |= {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
        return {
            "url": hf_hub_url(self.source, file, revision=self.revision),
            "headers": headers,
            "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
            "follow_redirects": True,
        }

    def _range(self, file: str, first: int, count: int) -> bytes:
        """`count` bytes of a file. Raises HubError."""
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        try:
            response = http_backoff("GET", **self._request(file, first, count))
            hf_raise_for_status(response)
        except Exception as exc:
            raise explain(exc, self.source, self.revision) from exc
        found = _range_of(response.headers)
        if response.status_code != 206 or found is None:
            raise self._no_ranges(file)
        self._check_same(file, _Version(int(found[2]), response.headers.get("ETag")))
        if int(found[1]) != first or len(response.content) != count:
            raise HubError(
                f"the Hub sent {len(response.content)} bytes of '{file}' of '{self.source}' from "
                f"{found[1]} on; expected {count} from {first} on: run again"
            )
        return response.content

    def _check_same(self, file: str, found: _Version) -> None:
        """Raises HubError if a file is another one than when a part of it was first read."""
        known = self._versions.setdefault(file, found)
        if known != found:
            raise HubError(
                f"'{file}' of '{self.source}' has changed while it was read ({known.num_bytes} bytes, ETag "
                f"{known.etag}; now {found.num_bytes}, {found.etag}): run again"
            )


def _range_of(headers: Any) -> re.Match[str] | None:
    """(first byte, bytes of the file) that an answer's headers name."""
    return re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
