"""The frame around a run or a life, and the file that it becomes."""

import base64
import contextlib
import hashlib
import os
import pathlib

from markupsafe import Markup

from tpu_lm.errors import UserError
from tpu_lm.report import records, run_page, story
from tpu_lm.report.markup import html, join

FILE = 'report.html'
_HERE = pathlib.Path(__file__).parent
# The policy lets nothing load and no other script run than the page's own.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}{more}</style>
</head>
<body>
<header>
<p class="kicker">{kicker}</p>
<h1>{title}</h1>
{lead}
</header>
<nav aria-label="On this page"><ol>
{contents}
</ol></nav>
<main>
{sections}
</main>
<script>{script}</script>
</body>
</html>
"""


def framed(
  title: str,
  lead: Markup,
  found: list[tuple[str, str, Markup]],
  kicker: str = 'tpu_lm report',
  more: str = '',
) -> str:
  """A whole page.

  Args:
    title: its heading.
    lead: what stands below.
    found: (anchor, heading, content) of its sections.
    kicker: the line above the heading.
    more: CSS, besides style.css.
  """
  style = (_HERE / 'style.css').read_text(encoding='utf-8')
  script = (_HERE / 'script.js').read_text(encoding='utf-8')
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  return html(
    _PAGE,
    title=title,
    lead=lead,
    digest=Markup(digest),
    kicker=kicker,
    style=Markup(style),
    more=Markup(more),
    script=Markup(script),
    contents=join(
      html('<li><a href="#{}">{}</a></li>', anchor, heading)
      for anchor, heading, _ in found
    ),
    sections=join(
      html(
        '<section id="{}" class="chapter">\n<h2>{}</h2>\n{}\n</section>',
        anchor,
        heading,
        content,
      )
      for anchor, heading, content in found
    ),
  )


def page(workdir: pathlib.Path) -> str:
  """The page about a working directory, or about a folder of them.

  Raises:
    UserError: it is neither, or a file in it is damaged.
  """
  if not workdir.is_dir():
    raise UserError(
      f'--workdir={workdir}: no such folder; give one that `tpu_lm train` or '
      '`tpu_lm quickstart` made'
    )
  if (workdir / 'config.json').is_file():
    record = records.read(workdir)
    title = f'A run of {record.config.stage_name}'
    if record.name != record.config.stage_name:
      title = f'{record.name}: {title[0].lower()}{title[1:]}'
    return framed(title, run_page.lead(record), run_page.sections(record))
  names = [path.parent.name for path in workdir.glob('*/config.json')]
  if not names:
    raise UserError(
      f'--workdir={workdir}: no run is there (neither config.json nor folders '
      'with one); give a folder that `tpu_lm train` or `tpu_lm quickstart` made'
    )
  life = story.read(workdir, names)
  return framed(
    'The life of a small language model', story.lead(life), story.sections(life)
  )


def write(
  workdir: pathlib.Path, to: pathlib.Path | None = None
) -> pathlib.Path:
  """Writes the page; the file is whole or the old one.

  Args:
    workdir: of a run, or a folder of runs such as a quickstart's.
    to: the file to write; None: WORKDIR/report.html.

  Returns:
    The file that was written.

  Raises:
    UserError: there is no run, or the file cannot be written.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / FILE if to is None else pathlib.Path(to)
  text = page(workdir).encode()
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(text)
    temporary.replace(path)
  except OSError as error:
    raise UserError(
      f'{path}: cannot be written ({error.strerror}); give another file with '
      '--to'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
  return path
