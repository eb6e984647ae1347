"""What a run learns, as four functions: Tool-N1's own, or those of the file that `--task` names (run/task_file.py)."""

from dataclasses import dataclass

from tooln1.data import Example, read_examples
from tooln1.prompt import build_messages
from tooln1.rewards import FORMAT_FAULTS, REWARDS, fault_of


@dataclass
class Task:
    """Tool-N1: the one template, and a rule-based reward. The functions of a task file have the same arguments."""

    think: bool = True  # ask for reasoning
    rule: str = "binary"  # a key of `REWARDS`
    file: str = ""  # the task file; "": there is none
    fingerprint: str = "tool_n1"  # of the file's text

    def read(self, path: str) -> list[Example]:
        """The examples in a file; further JSON fields are allowed (`Example.extra`) only for a task file."""
        return read_examples(path, allow_extra=bool(self.file))

    def messages(self, example: Example) -> list[dict]:
        """The chat messages that ask for a reply."""
        return build_messages(example, self.think)

    def reward(self, reply: str, example: Example) -> float:
        """The reward of a reply's text: any finite number."""
        return REWARDS[self.rule](reply, example.answer)

    def metrics(self, reply: str, example: Example) -> dict[str, float]:
        """Numbers of a reply, by name; their means over the replies of a step are logged.

        accuracy is the binary reward, whatever reward is trained on; format_ok: the reply's calls can be parsed.
        """
        if self.file and not example.tools:  # the reply to it need not be calls
            return {}
        fault = fault_of(reply, example.answer, self.think)
        return {"accuracy": fault == "none", "format_ok": fault not in FORMAT_FAULTS}


TOOL_N1 = Task()
