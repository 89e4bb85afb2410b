"""`report.html`: one page about a run, or about the whole life of a model.

The page is one file that needs no network: its style, its script and its
charts (SVG) stand in it. All that comes from data (answers, names, settings)
passes through `markup.html`, which escapes it. The same input gives the same
bytes. What is told, file by file:

  records   what a working directory holds: configuration, metrics, sizes
  glossary  figures by their names: what they mean, how they are written
  command   the command that repeats a run
  axes      of a chart: scales, ticks, the grid
  chart     lines, points and rows as SVG
  curves    which charts a run has
  rollouts  a few answers of a run that learns from rewards
  run_page  the page of one run
  preferences, rewards, figures   chapters of that page
  story     the page of a folder of runs, such as a quickstart's
  page      the frame of either, and the file
"""

from tpu_lm.report.page import write

__all__ = ['write']
