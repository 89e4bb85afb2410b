import html
import itertools
import re

import pytest

from tpu_lm.report import axes, chart


@pytest.mark.parametrize(
  ('low', 'high', 'most', 'expected'),
  [
    (0, 10, 5, [0, 2, 4, 6, 8, 10]),
    (0, 1500, 4, [0, 500, 1000, 1500]),
    (0.41, 0.61, 4, [0.45, 0.5, 0.55, 0.6]),
    (-3, 2, 5, [-3, -2, -1, 0, 1, 2]),
    (1e-5, 9e-5, 4, [2e-5, 4e-5, 6e-5, 8e-5]),
  ],
)
def test_ticks_are_round_and_inside(low, high, most, expected):
  assert axes.ticks(low, high, most) == pytest.approx(expected)


@pytest.mark.parametrize(
  ('value', 'marks', 'percent', 'expected'),
  [
    (0.5, [0.25, 0.5], False, '0.50'),
    (0.5, [0.25, 0.5], True, '50%'),
    (1500, [500, 1000, 1500], False, '1,500'),
    (20_000, [0, 20_000], False, '20 k'),
    (2_500_000, [0, 2_500_000], False, '2.5 M'),
    (-0.05, [-0.05, 0], False, '−0.05'),
    (0.125, [0.125, 0.25], True, '12.5%'),
    (2e-5, [0, 2e-5], False, '2e−05'),
  ],
)
def test_ticks_are_written_with_the_places_they_need(
  value, marks, percent, expected
):
  assert axes.tick_text(value, marks, percent) == expected


def test_many_points_become_means_and_what_is_not_finite_stays_seen():
  points = [(float(i), float(2 * i)) for i in range(1000)]
  points[500] = (500.0, None)
  found = chart.thinned(points, most=100)
  assert found[0] == (4.5, 9.0)  # of 0 … 9
  assert [x for x, y in found if y is None] == [500.0]
  assert len(found) == 101
  steps = [x for x, _ in found]
  assert steps == sorted(steps)
  assert chart.thinned(points[:50], most=100) == points[:50]


def test_a_value_that_is_not_finite_breaks_the_line_and_is_marked():
  points = [(0, 1.0), (1, 2.0), (2, None), (3, 2.0), (4, 1.0)]
  drawing = chart.lines('Loss', [chart.Series('train', points, 'sft')])
  path = re.search(r' d="([^"]+)"', drawing)[1]
  assert path.count('M') == 2
  assert path.count('L') == 2
  assert 'train: not finite (2)' in drawing


def test_the_drawing_says_in_words_what_it_shows():
  series = [chart.Series('held out', [(10, 0.5), (20, 0.25)], 'dpo')]
  drawing = chart.lines('Accuracy', series, percent=True, floors=[('x', 0.1)])
  said = html.unescape(re.search(r'aria-label="([^"]+)"', drawing)[1])
  assert said == 'Accuracy, by step. held out: 50.0% at 10, 25.0% at 20.'
  assert 'class="floor"' in drawing


def test_a_line_goes_down_where_values_fall():
  drawing = chart.lines('L', [chart.Series('a', [(0, 4.0), (1, 2.0)], 'sft')])
  path = re.search(r'd="M(\S+) (\S+)L(\S+) ([^"]+)"', drawing)
  x0, y0, x1, y1 = map(float, path.groups())
  assert x0 < x1
  assert y0 < y1  # units grow downwards
  assert axes.TOP <= y0 <= axes.HEIGHT - axes.BOTTOM
  assert x1 <= axes.WIDTH


@pytest.mark.parametrize(
  'points',
  [
    [],
    [(1, None)],
    [(5, 3.0)],
    [(0, 0.0), (1, 0.0)],
    [(0, -1e299), (1, 1e299)],
    [(0, 1e-300), (1, 2e-300)],
    [(0, 7.0), (1, 7.0 + 1e-14)],
    [(10**12, 1.0), (10**12 + 1, 2.0)],
  ],
)
def test_odd_series_are_drawn_or_said_to_be_empty(points):
  drawing = chart.lines('Odd', [chart.Series('one', points, 'ppo')])
  drawn = any(y is not None for _, y in points)
  assert ('<svg' in drawing) == drawn
  assert ('nothing to draw' in drawing) != drawn
  assert 'nan' not in drawing
  assert 'inf' not in drawing


def test_labels_at_the_end_do_not_touch():
  ends = (1.0, 1.01, 1.02, 0.0)
  series = [
    chart.Series(f's{i}', [(0, 0.5), (1, y)], 'sft') for i, y in enumerate(ends)
  ]
  drawing = chart.lines('L', series)
  heights = sorted(
    float(y) for y in re.findall(r'class="label[^>]* y="([\d.]+)"', drawing)
  )
  assert len(heights) == 4
  gaps = [b - a for a, b in itertools.pairwise(heights)]
  assert min(gaps) >= 13.9
  assert heights[-1] <= axes.HEIGHT - axes.BOTTOM


def test_a_calibrated_model_lies_on_the_diagonal():
  bins = [(0.6, 0.6, 10), (0.9, 0.9, 40), (0.7, 0.5, 0)]
  drawing = chart.reliability('Calibration', bins, 'reward')
  x0, y0, x1, y1 = (
    float(re.search(rf'class="floor".*? {name}="([\d.]+)"', drawing)[1])
    for name in ('x1', 'y1', 'x2', 'y2')
  )
  dots = re.findall(
    r'class="dot" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', drawing
  )
  assert len(dots) == 2  # an empty bin is none
  for cx, cy, _ in dots:
    share = (float(cx) - x0) / (x1 - x0)
    assert float(cy) == pytest.approx(y0 + share * (y1 - y0), abs=0.2)
  areas = [float(r) ** 2 for _, _, r in dots]
  assert areas[1] / areas[0] == pytest.approx(4, rel=0.05)


def test_rows_and_points_leave_out_what_is_no_number():
  row = chart.Row('sft', 'sft', [('sums', None, True), ('facts', 0.5, False)])
  drawing = chart.rows('Right', [row, row._replace(values=[])], percent=True)
  assert drawing.count('<circle') == 1
  assert 'sft, facts: 50.0%' in drawing
  spots = [chart.Spot('dpo', 2.0, 0.8, 'dpo'), chart.Spot('x', None, 1, 'ppo')]
  drawing = chart.scatter('KL', spots, x_label='KL', y_label='wins')
  assert drawing.count('<circle') == 1
