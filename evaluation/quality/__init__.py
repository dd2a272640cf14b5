"""Quality of a compressed cache: what the model still knows of a context, compressed before a question or after it."""

from .cases import Case, Needle, Prompt
from .methods import METHODS, Method, with_profile
from .needles import needle_cases
from .run import Options, run_all
from .summary import summarize
from .tasks import TASKS, task_case

__all__ = [
    "METHODS",
    "TASKS",
    "Case",
    "Method",
    "Needle",
    "Options",
    "Prompt",
    "needle_cases",
    "run_all",
    "summarize",
    "task_case",
    "with_profile",
]
