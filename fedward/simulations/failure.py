"""An error on its way out of another process of the simulation."""

from dataclasses import dataclass

from fedward.errors import FedwardError


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Class and message of an error; some of the tree cannot be made from their message alone.

    Args:
        kind: Its class.
        text: Its message.
    """

    kind: type[FedwardError]
    text: str

    def error(self) -> FedwardError:
        """The error, with class and message, without attributes.

        >>> from fedward.errors import InvalidValue
        >>> Failure(kind=InvalidValue, text="r = 0: expected 1 or more").error()
        InvalidValue('r = 0: expected 1 or more')
        """
        return self.kind.__new__(self.kind, self.text)
