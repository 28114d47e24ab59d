from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TYPE_UNSPECIFIED: _ClassVar[Type]
    TYPE_FLOAT32: _ClassVar[Type]
    TYPE_FLOAT64: _ClassVar[Type]

class Failure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_UNSPECIFIED: _ClassVar[Failure]
    FAILURE_PLAN: _ClassVar[Failure]
    FAILURE_MODEL: _ClassVar[Failure]
    FAILURE_DATA: _ClassVar[Failure]
    FAILURE_PRIVACY: _ClassVar[Failure]
    FAILURE_LIBRARY: _ClassVar[Failure]
    FAILURE_BUSY: _ClassVar[Failure]
    FAILURE_CANCELLED: _ClassVar[Failure]
    FAILURE_REQUEST: _ClassVar[Failure]
    FAILURE_FORGOTTEN: _ClassVar[Failure]

class Activity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVITY_UNSPECIFIED: _ClassVar[Activity]
    ACTIVITY_IDLE: _ClassVar[Activity]
    ACTIVITY_PREPARING: _ClassVar[Activity]
    ACTIVITY_TRAINING: _ClassVar[Activity]
    ACTIVITY_EVALUATING: _ClassVar[Activity]
TYPE_UNSPECIFIED: Type
TYPE_FLOAT32: Type
TYPE_FLOAT64: Type
FAILURE_UNSPECIFIED: Failure
FAILURE_PLAN: Failure
FAILURE_MODEL: Failure
FAILURE_DATA: Failure
FAILURE_PRIVACY: Failure
FAILURE_LIBRARY: Failure
FAILURE_BUSY: Failure
FAILURE_CANCELLED: Failure
FAILURE_REQUEST: Failure
FAILURE_FORGOTTEN: Failure
ACTIVITY_UNSPECIFIED: Activity
ACTIVITY_IDLE: Activity
ACTIVITY_PREPARING: Activity
ACTIVITY_TRAINING: Activity
ACTIVITY_EVALUATING: Activity

class Asked(_message.Message):
    __slots__ = ("task", "adapter")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    task: Task
    adapter: bytes
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., adapter: _Optional[bytes] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("plan", "run", "round", "session", "attempt", "draw", "layout", "adapter_bytes", "dataset", "source", "keep", "kept", "spent", "counted")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DRAW_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    run: str
    round: int
    session: int
    attempt: int
    draw: int
    layout: bytes
    adapter_bytes: int
    dataset: str
    source: bytes
    keep: bytes
    kept: bytes
    spent: int
    counted: int
    def __init__(self, plan: _Optional[bytes] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., session: _Optional[int] = ..., attempt: _Optional[int] = ..., draw: _Optional[int] = ..., layout: _Optional[bytes] = ..., adapter_bytes: _Optional[int] = ..., dataset: _Optional[str] = ..., source: _Optional[bytes] = ..., keep: _Optional[bytes] = ..., kept: _Optional[bytes] = ..., spent: _Optional[int] = ..., counted: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("failure", "progress", "vector", "part", "scores", "done")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    failure: Failure
    progress: Progress
    vector: Vector
    part: bytes
    scores: Scores
    done: Done
    def __init__(self, failure: _Optional[_Union[Failure, str]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., part: _Optional[bytes] = ..., scores: _Optional[_Union[Scores, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("type", "length")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    type: Type
    length: int
    def __init__(self, type: _Optional[_Union[Type, str]] = ..., length: _Optional[int] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("loss", "accuracy", "macro_f1")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MACRO_F1_FIELD_NUMBER: _ClassVar[int]
    loss: float
    accuracy: float
    macro_f1: float
    def __init__(self, loss: _Optional[float] = ..., accuracy: _Optional[float] = ..., macro_f1: _Optional[float] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("activity", "step")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    activity: Activity
    step: int
    def __init__(self, activity: _Optional[_Union[Activity, str]] = ..., step: _Optional[int] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
