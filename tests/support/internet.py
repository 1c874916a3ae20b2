"""An internet on loopback: HTTPS sites of any name, reached through a proxy. Standard library and openssl."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from pathlib import Path

DOMAIN_CHECK = "https://api.anthropic.com/api/web/domain_info?domain="  # the client asks there before it fetches


class Internet:
    """`redirects` maps a URL to the one it leads to; other pages say which they are. `asked`: every request's text."""

    def __init__(self, folder: Path, hosts: list[str], redirects: dict[str, str]):
        folder.mkdir()
        self.redirects, self.asked = redirects, []
        names = ",".join(f"DNS:{h}" for h in (*hosts, "api.anthropic.com"))
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=internet"]
        certificate, key = folder / "certificate.pem", folder / "key.pem"
        files = ["-keyout", key, "-out", certificate, "-addext", f"subjectAltName={names}"]
        subprocess.run([*request, *files], check=True, capture_output=True)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)
        self.proxy = socket.create_server(("127.0.0.1", 0))
        at = "http://127.0.0.1:%d" % self.proxy.getsockname()[1]
        self.env = {"HTTPS_PROXY": at, "NO_PROXY": "127.0.0.1", "NODE_EXTRA_CA_CERTS": str(certificate)}
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def urls(self) -> set[str]:
        """What was asked of the sites themselves."""
        return {r.split("\r\n")[0] for r in self.asked if not r.startswith(DOMAIN_CHECK)}

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._answer, args=self.proxy.accept()[:1], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            target = head(connection).split()[1].rpartition(":")[0]  # CONNECT host:443
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            with self.tls.wrap_socket(connection, server_side=True) as site:
                asked = head(site)
                url = f"https://{target}{asked.split()[1]}"
                self.asked.append(f"{url}\r\n{asked}")
                page, status, more = f"<h1>{url}</h1>", "200 OK", "Content-Type: text/html"
                if url in self.redirects:
                    page, status, more = "", "302 Found", f"Location: {self.redirects[url]}"
                elif url.startswith(DOMAIN_CHECK):
                    page, more = '{"can_fetch": true}', "Content-Type: application/json"
                more += f"\r\nContent-Length: {len(page)}\r\nConnection: close"
                site.sendall(f"HTTP/1.1 {status}\r\n{more}\r\n\r\n{page}".encode())


def head(connection: socket.socket) -> str:
    """A request up to its empty line."""
    got = b""
    while b"\r\n\r\n" not in got:
        more = connection.recv(65536)
        if not more:
            raise OSError("closed early")
        got += more
    return got.decode("latin-1")
