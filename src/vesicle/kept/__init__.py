"""What a method that forgets keeps of a text: by head, token, class of token, age and layer."""

from vesicle.kept.analysis import Kept, by_class, read
from vesicle.kept.classes import classes

__all__ = ["Kept", "by_class", "classes", "read"]
