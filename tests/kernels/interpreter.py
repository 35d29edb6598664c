"""Makes Triton 3.6's interpreter run with numpy 2.4, which no longer turns a one-element array into an int."""

from triton.runtime import interpreter

_original = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def repair() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor
