"""Changes to the servers of Horovod's launchers: they authenticate each request before they read it.

Every request has the secret of the job (env/horovod_secrets.py) in its header. Servers that other users can reach
unpickle nothing and serve no files, and they listen on one address where that is enough.
"""

from __future__ import annotations

from env.horovod_secrets import JOB_SECRET, Change

_ASK = "the key-value server had no authentication, and served files of its working folder to everyone"
_PICKLE = "the key-value server unpickled what was sent to it"
_LISTEN = "launchers listened on all addresses, although one is enough"
_CACHE = "results of host checks were cached for an hour in a pickle file; hosts are now checked each time"
_WIRE = "horovod/runner/common/util/network.py"
_LAUNCH = "horovod/runner/launch.py"
_PORTS = "horovod/runner/util/network.py"
_SERVER = "horovod/runner/http/http_server.py"
_CLIENT = "horovod/runner/http/http_client.py"
_WORKER = "horovod/runner/elastic/worker.py"
_DRIVER = "horovod/runner/elastic/rendezvous.py"
_STORE = "horovod/common/gloo/http_store.cc"
_GLOO_RUN = "horovod/runner/gloo_run.py"

_CHECK = """class KVStoreHandler(BaseHTTPRequestHandler):
    # Set timeout
    timeout = SINGLE_REQUEST_TIMEOUT

    def parse_request(self):
        if not super().parse_request():
            return False
        if secret.is_job_secret(self.headers.get('Authorization', '')):
            return True
        self.close_connection = True
        length = self.headers.get('Content-Length', '')
        try:  # unread, it would break the connection before the answer is read
            self.rfile.read(min(int(length), 65536) if length.isdecimal() else 0)
        except OSError:
            pass
        self.send_status_code(403)
        return False
"""


def listeners() -> list[Change]:
    """Return the changes, to be applied after those of `secrets`."""
    return [
        (_SERVER, "import HTTPServer, SimpleHTTPRequestHandler\n", "import BaseHTTPRequestHandler, HTTPServer\n", _ASK),
        (
            _SERVER,
            "from horovod.runner.util.network import find_port\n",
            "from horovod.runner.common.util import secret\nfrom horovod.runner.util.network import find_port\n",
            _ASK,
        ),
        (
            _SERVER,
            "class KVStoreHandler(SimpleHTTPRequestHandler):\n    # Set timeout\n"
            "    timeout = SINGLE_REQUEST_TIMEOUT\n",
            _CHECK,
            _ASK,
        ),
        (_CLIENT, "import codec\n", "import codec, secret\n", _ASK),
        (_CLIENT, "Request(url)\n", "Request(url, headers={'Authorization': secret.authorization()})\n", _ASK),
        (
            _CLIENT,
            "def put_data_into_kvstore(addr, port, scope, key, value):\n",
            "def put_data_into_kvstore(addr, port, scope, key, value):\n"
            "    put_bytes_into_kvstore(addr, port, scope, key, codec.dumps_base64(value, to_ascii=False))\n\n\n"
            "def put_bytes_into_kvstore(addr, port, scope, key, data):\n",
            _PICKLE,
        ),
        (
            _CLIENT,
            "data=codec.dumps_base64(value, to_ascii=False))\n        req.get",
            "data=data, headers={'Authorization': secret.authorization()})\n        req.get",
            _ASK,
        ),
        (
            _STORE,
            "request.send(method, body);\n",
            "request.send(method, body, headers);\n",
            _ASK,
        ),
        (
            _STORE,
            "  for (int retry_cnt = 0; retry_cnt < MAX_RETRY_TIMES; ++retry_cnt) {\n",
            "  std::vector<std::string> headers;\n"
            f'  if (const char* secret = std::getenv("{JOB_SECRET}")) {{\n'
            '    headers.push_back(std::string("Authorization: Bearer ") + secret);\n  }\n'
            "  for (int retry_cnt = 0; retry_cnt < MAX_RETRY_TIMES; ++retry_cnt) {\n",
            _ASK,
        ),
        (_STORE, "#include <cstring>\n", "#include <cstdlib>\n#include <cstring>\n", _ASK),
        (_WORKER, "import os\nimport threading\n", "import json\nimport os\nimport threading\n", _PICKLE),
        (_WORKER, "import put_data_into_kvstore\n", "import put_bytes_into_kvstore\n", _PICKLE),
        (_WORKER, "            put_data_into_kvstore(", "            put_bytes_into_kvstore(", _PICKLE),
        (
            _WORKER,
            "value = (self._service.addresses(), secret_key)\n",
            "value = json.dumps([self._service.addresses(), secret_key.hex()]).encode()\n",
            _PICKLE,
        ),
        (_DRIVER, "import logging\n", "import json\nimport logging\n", _PICKLE),
        (_DRIVER, "from horovod.runner.common.util import codec\n", "", _PICKLE),
        (
            _DRIVER,
            "addresses, secret_key = codec.loads_base64(value)\n",
            "addresses, secret_key = json.loads(value)\n"
            "                addresses = {nic: [tuple(address) for address in found] "
            "for nic, found in addresses.items()}\n"
            "                secret_key = bytes.fromhex(secret_key)\n",
            _PICKLE,
        ),
        # -- listening addresses
        (_PORTS, "def find_port(server_factory):\n", "def find_port(server_factory, address='127.0.0.1'):\n", _LISTEN),
        (_PORTS, "            addr = ('', port)\n", "            addr = (address, port)\n", _LISTEN),
        (
            _SERVER,
            "def start(self, handler_cls=RendezvousHandler):\n",
            "def start(self, handler_cls=RendezvousHandler, address='127.0.0.1'):\n",
            _LISTEN,
        ),
        (_SERVER, "addr, handler_cls, self._verbose))\n", "addr, handler_cls, self._verbose), address)\n", _LISTEN),
        (_SERVER, "def start_server(self):\n", "def start_server(self, address='127.0.0.1'):\n", _LISTEN),
        (_SERVER, "addr, KVStoreHandler, self.verbose))\n", "addr, KVStoreHandler, self.verbose), address)\n", _LISTEN),
        (_GLOO_RUN, "rendezvous.start()\n", "rendezvous.start(address=server_ip)\n", _LISTEN),
        (_GLOO_RUN, "    global_rendezv_port = rendezvous.start(handler)\n", "", _LISTEN),
        (
            _GLOO_RUN,
            "    server_ip = network.get_driver_ip(nics)\n",
            "    server_ip = network.get_driver_ip(nics)\n"
            "    global_rendezv_port = rendezvous.start(handler, server_ip)\n",
            _LISTEN,
        ),
        (_GLOO_RUN, "run_func_server.start_server()\n", "run_func_server.start_server(server_ip)\n", _LISTEN),
        (_LAUNCH, "run_func_server.start_server()\n", "run_func_server.start_server(driver_ip)\n", _LISTEN),
        (
            _WIRE,
            "                addr, self._make_handler()))\n",
            "                addr, self._make_handler()), self._listening_address())\n",
            _LISTEN,
        ),
        (
            _WIRE,
            "    def _get_local_addresses(self):\n",
            "    def _listening_address(self):\n"
            '        """That of the one interface that was named; all where none was, or where it has several."""\n'
            "        found = [address.address for nic in self._nics or () "
            "for address in psutil.net_if_addrs().get(nic, ())\n"
            "                 if address.family == socket.AF_INET]\n"
            "        return found[0] if len(found) == 1 else ''\n\n"
            "    def _get_local_addresses(self):\n",
            _LISTEN,
        ),
        (_WORKER, "(secret_key, nic, self)\n", "(secret_key, nic and [nic], self)\n", _LISTEN),
        # -- unpickling from disk
        (_LAUNCH, "    if not args.disable_cache:\n", "    if False:\n", _CACHE),
    ]
