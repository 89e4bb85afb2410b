"""A small endpoint of the chat-completions kind, with faults on purpose."""

import contextlib
import http.server
import json
import re
import threading
import time


class Server(http.server.ThreadingHTTPServer):
  """Answers by `answer(messages)` or `drawn(body)`; keeps what it was asked.

  Attributes:
    url: up to /v1.
    asked: the bodies of all calls.
    headers: those of the calls.
    faults: taken first, one a call: a status, or cut, garbage, slow, empty,
      moved, length, silent (no usage).
  """

  daemon_threads = True
  request_queue_size = 64  # else a connection may wait a second
  # A client that gave up is no error of ours.
  block_on_close = False

  def __init__(self, answer):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.answer = answer
    self.drawn = lambda body: self.answer(body['messages'])
    self.asked, self.headers, self.faults = [], [], []
    self.most_at_once = self.at_once = 0
    self.pause = 0.0
    self.more = {}  # headers of faults
    self.lock = threading.Lock()
    self.url = f'http://127.0.0.1:{self.server_address[1]}/v1'

  def handle_error(self, request, client_address):
    """Tests cut connections on purpose."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, *args):
    """Says nothing."""

  def do_POST(self):
    server = self.server
    body = self.rfile.read(int(self.headers['Content-Length']))
    with server.lock:
      fault = server.faults.pop(0) if server.faults else None
      server.asked.append(json.loads(body))
      server.headers.append(dict(self.headers))
      server.at_once += 1
      server.most_at_once = max(server.most_at_once, server.at_once)
    time.sleep(server.pause)
    # Before the reply: once that is out, the client may call again.
    with server.lock:
      server.at_once -= 1
    self._reply(json.loads(body), fault)

  def _reply(self, asked, fault):
    if self.path != '/v1/chat/completions':
      self._send(404, {'error': {'message': 'no such path'}})
    elif isinstance(fault, int):
      key = self.headers.get('Authorization', '')
      said = {'error': {'message': f'fault {fault} for {key}'}}
      self._send(fault, said, self.server.more)
    elif fault == 'moved':
      self._send(302, {}, {'Location': self.server.url + '/elsewhere'})
    elif fault == 'garbage':
      self._send(200, b'<html>not JSON</html>')
    elif fault == 'empty':
      self._send(200, {'choices': []})
    elif fault == 'slow':
      self._drip()
    else:
      said = self.server.drawn(asked)
      reply = completion(asked['messages'], said, fault)
      self._send(200, reply, cut=fault == 'cut')

  def _send(self, status, content, headers=None, cut=False):
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content[: len(content) // 2] if cut else content)
    if cut:
      self.close_connection = True

  def _drip(self):
    """A byte now and then, so that no single read is late."""
    self.send_response(200)
    self.send_header('Content-Length', '1000')
    self.end_headers()
    with contextlib.suppress(OSError):
      for _ in range(100):
        self.wfile.write(b' ')
        time.sleep(0.05)


def completion(messages, said, fault=None):
  """The JSON of a reply; a token is a word."""
  count = sum(len(message['content'].split()) for message in messages)
  choice = {
    'message': {'role': 'assistant', 'content': said},
    'finish_reason': 'length' if fault == 'length' else 'stop',
  }
  usage = {'prompt_tokens': count, 'completion_tokens': len(said.split())}
  if fault == 'silent':
    return {'choices': [choice]}
  return {'choices': [choice], 'usage': usage}


@contextlib.contextmanager
def serving(answer):
  """A server in a thread."""
  server = Server(answer)
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def texts(messages):
  """What stands between the marks of a judge's prompt, in its order."""
  found = re.findall(
    r'<text (\w+)>\n(.*?)\n</text \1>', messages[-1]['content'], re.S
  )
  return [text for _, text in found]


def letters_e(messages):
  """Prefers the answer with more letters e; grades by their number."""
  shown = texts(messages)
  if 'Answer A:' in messages[-1]['content']:
    a, b = (text.count('e') for text in shown[-2:])
    said = 'A' if a > b else 'B' if b > a else 'C'
    return f'A has {a}, B has {b}.\n[[{said}]]'
  return f'It has some.\n[[{min(10, shown[-1].count("e"))}]]'
