"""A sandbox for code that a model wrote, and the judging of what it gives.

- strength.py: how much is isolated on this machine, proven; `sandbox()`;
- protocol.py: the pool of servers, and what came back of a run;
- child.py, layers.py, values.py: what runs inside;
- cases.py, asserts.py: a record's tests, and whether they hold.
"""

from tpu_lm.sandbox.protocol import Outcome, Run, Sandbox, SandboxError
from tpu_lm.sandbox.strength import Grade, grade, sandbox, strongest

__all__ = [
  'Grade',
  'Outcome',
  'Run',
  'Sandbox',
  'SandboxError',
  'grade',
  'sandbox',
  'strongest',
]
