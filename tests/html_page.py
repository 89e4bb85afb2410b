"""A reader of pages."""

import html.parser

# Elements without an end, and those that our pages leave to SVG.
_VOID = {'meta', 'link', 'br', 'wbr'}


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

  def all(self, tag, kind=''):
    """Attributes of all such elements, or of those of a class."""
    return [
      attributes
      for name, attributes in self.tags
      if name == tag
      and (not kind or kind in attributes.get('class', '').split())
    ]
