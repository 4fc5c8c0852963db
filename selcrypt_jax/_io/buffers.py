"""Memory for tensors: large pages that are not filled with zeros first."""

import mmap
import sys

_LARGE = 1 << 20  # bytes from which separate pages are worth it


def new_buffer(size: int) -> memoryview:
    """Writable bytes, all zero; a large buffer uses memory only as it is filled."""
    if size < _LARGE or sys.platform == "win32":
        return memoryview(bytearray(size))
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # a small page costs more to allocate than to decrypt
    return memoryview(pages)
