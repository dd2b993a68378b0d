"""Which task of an adapter a request is of."""

from __future__ import annotations

from ..api_error import ApiError


def task_of(asked: int | None, num_tasks: int, model: str) -> int | None:
    """The task that a request's `task_id` names, None for an adapter that learned no several.

    Args:
        num_tasks: that the adapter learned. model: as clients know it.

    Raises:
        ApiError: 400; the adapter has no such task, or several of which none is named.
    """
    if not num_tasks:
        if asked is not None:
            raise _refused(f"The model '{model}' has no tasks to choose from. Leave 'task_id' out.")
        return None
    if asked is None:
        if num_tasks == 1:
            return 0
        raise ApiError(
            f"The model '{model}' learned {num_tasks} tasks: say by 'task_id', from 0 to {num_tasks - 1}, which is "
            "meant.",
            param="task_id",
            code="missing_required_parameter",
        )
    if asked >= num_tasks:
        raise _refused(
            f"The model '{model}' learned {num_tasks} tasks, numbered from 0; 'task_id' is {asked}."
        )
    return asked


def _refused(message: str) -> ApiError:
    return ApiError(message, param="task_id", code="invalid_value")
