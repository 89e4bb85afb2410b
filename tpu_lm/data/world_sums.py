"""Small arithmetic of the little world: in digits, in words, as questions."""

from collections.abc import Sequence

from tpu_lm.data.world_facts import number_word, words

OPERANDS = {
  'plus': [(a, b) for a in range(1, 21) for b in range(1, 21)],
  'minus': [(a, b) for a in range(1, 21) for b in range(1, a + 1)],
  'times': [(a, b) for a in range(2, 10) for b in range(2, 10)],
}
SIGNS = {'plus': '+', 'minus': '-', 'times': '*'}
COUNTABLES = words('apples pears plums nuts eggs coins stones shells')


def result(operation: str, operands: Sequence[int]) -> int:
  """Returns a + b (+ c …), a - b, or a * b."""
  if operation == 'plus':
    return sum(operands)
  a, b = operands
  return a - b if operation == 'minus' else a * b


def equation(
  operation: str, operands: Sequence[int], right: str | None = None
) -> str:
  """Returns '3 + 4 = 7', or with what is given in place of the 7."""
  left = f' {SIGNS[operation]} '.join(map(str, operands))
  return f'{left} = {right or result(operation, operands)}'


def spoken(
  operation: str, operands: Sequence[int], right: str | None = None
) -> str:
  """Returns 'Three plus four is seven.', or with what is given at its end."""
  left = f' {operation} '.join(map(number_word, operands))
  right = right or number_word(result(operation, operands))
  return f'{left} is {right}.'.capitalize()


def operations() -> tuple[list[tuple[str, tuple[int, ...]]], list[int]]:
  """Returns every operation with its operands, and its weight."""
  options, weights = [], []
  for operation, pairs in OPERANDS.items():
    for operands in pairs:
      options.append((operation, operands))
      weights.append(15 if max(operands) <= 10 else 1)
  for a in range(1, 6):
    for b in range(1, 6):
      for c in range(1, 6):
        options.append(('plus', (a, b, c)))
        weights.append(5)
  return options, weights


def digits_question(operation: str, operands: Sequence[int]) -> str:
  """Returns 'How much is 3 + 4?'"""
  left = f' {SIGNS[operation]} '.join(map(str, operands))
  return f'How much is {left}?'


def words_question(operation: str, operands: Sequence[int]) -> str:
  """Returns 'What is three plus four?'"""
  return f'What is {f" {operation} ".join(map(number_word, operands))}?'


OPERATIONS, WEIGHTS = operations()
