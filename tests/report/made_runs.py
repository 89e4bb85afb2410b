"""Working directories as `train` leaves them, and a reader of pages."""

import html.parser
import json
import pathlib

from tpu_lm import config as configs

CONFIG = pathlib.Path(configs.__file__).parent.parent / 'configs/quickstart.py'
# Elements without an end, and those that this page leaves to SVG.
_VOID = {'meta', 'link', 'br', 'wbr'}


def make_run(folder, variant='', lines=(), overrides=(), tail=''):
  """Writes config.json and metrics.jsonl of a stage of the quickstart."""
  folder.mkdir(parents=True)
  spec = f'{CONFIG}{variant and ":"}{variant}'
  config = configs.load(spec, list(overrides))
  (folder / 'config.json').write_text(config.to_json(indent=2, sort_keys=True))
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text + tail)
  return folder


def train(step, **values):
  return {
    'step': step,
    'stage': 'pretrain',
    'split': 'train',
    'tokens': step * 100,
    'seconds': step / 2,
    'tokens_per_second': 200.0,
    'loss': 4.0 - step / 10,
    **values,
  }


def heldout(step, **values):
  return {'step': step, 'stage': 'pretrain', 'split': 'heldout', **values}


class Page(html.parser.HTMLParser):
  """Every start tag with its attributes, and the text, of a page.

  Elements that are not closed in order are an error.
  """

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.tags, self.words, self._open = [], [], []
    self.feed(text)
    self.close()
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag, tag

  def handle_data(self, data):
    if self._open and self._open[-1] not in ('style', 'script'):
      self.words.append(data)

  @property
  def text(self):
    return ' '.join(' '.join(self.words).split())

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]
