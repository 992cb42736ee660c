"""The rules by family; importing this package registers them all."""

from . import elementwise, linear, loss, rows

__all__ = ["elementwise", "linear", "loss", "rows"]
