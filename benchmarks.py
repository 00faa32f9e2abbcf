"""The benchmarks that come as files (Section 5.1): GSM8K, BBH, MT-Bench, LongBench, and the needle; and all tasks.

Where it sits: beside tasks.py, which says what a task is; metrics.py has the official metrics.
"""

from tasks import RecallTask, Task, Wikitext

TASKS: dict[str, Task] = {task.name: task for task in (RecallTask(), Wikitext())}
