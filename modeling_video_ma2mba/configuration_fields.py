"""What the fields of a configuration have in common: a class that holds them with or without transformers, checks."""

from typing import Any


class Fields:
    """Base of a class of fields that stands by itself, or in front of transformers' class in a configuration.

    Fields that it doesn't know are kept, or left to transformers' class.
    """

    def __init__(self, **fields: Any) -> None:
        if type(self).__mro__[-2] is Fields:  # nothing stands behind
            vars(self).update(fields)
        else:
            super().__init__(**fields)


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """ValueError that names the field, its value and the rule, unless the condition holds."""
    if not condition:
        raise ValueError(f"{field}={value!r} is not valid: {rule}")


def positive_int(value: Any) -> bool:
    """Whether a value is a whole number above 0, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
