"""Raw xLAM and ToolACE data to `Example`s."""

from tooln1.prepare.convert import read_toolace, read_xlam

__all__ = ["read_toolace", "read_xlam"]
