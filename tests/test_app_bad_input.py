"""Bad input of every kind (images and HTTP): refused with its own code, never a 500, and the server stays as it was."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from backend.app.telemetry import resident_bytes
from tests.app_standin import Live, app_config, picture, png, serving

KEY = "correct horse"
LIMIT_MB = 2


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("server")
    with serving(app_config(folder, queue_size=500, max_upload_mb=LIMIT_MB)) as server:
        yield server


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(picture())).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """A small file that claims many pixels and holds them (all zero, well compressed for the first rows)."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(1 + 3 * min(width, 15_000)) * min(height, 50)))
        + chunk(b"IEND", b"")
    )


def png_with(kind: bytes, data: bytes) -> bytes:
    """A good PNG with one more chunk behind its header."""
    good = png()
    return good[:33] + chunk(kind, data) + good[33:]


def crc_broken() -> bytes:
    content = bytearray(png())
    at = content.index(b"IDAT") + 40
    content[at] ^= 255
    return bytes(content)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png())
    return buffer.getvalue()


BAD_EXIF = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xff" * 40
JPEG, PNG, WEBP = saved("JPEG"), png(), saved("WEBP")
NOT_IMAGES = {
    "no bytes": b"",
    "one byte": b"\x89",
    "text": b"hello, this is my photo",
    "html": b"<html><script>alert(1)</script></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "zip": zipped(),
    "tar": b"a.png" + bytes(95) + b"0000644" + bytes(400),
    "pickle": b"\x80\x04cos\nsystem\n.",
    "magic only": b"\xff\xd8\xff",
    "png magic only": b"\x89PNG\r\n\x1a\n",
    "riff without webp": b"RIFF\x10\x00\x00\x00WAVEfmt ",
    "gif": saved("GIF"),
    "bmp": saved("BMP"),
    "tiff": saved("TIFF"),
    "tiff of many frames": saved("TIFF", save_all=True, append_images=[Image.new("RGB", (64, 64))] * 3),
    "ico": saved("ICO"),
    "icns": saved("ICNS"),
    "dds": saved("DDS"),
    "eps": saved("EPS"),
    "psd": b"8BPS\x00\x01" + bytes(60),
    "fits": b"SIMPLE  =                    T" + bytes(100),
    "jpeg cut at 10 %": JPEG[: len(JPEG) // 10],
    "jpeg cut at 50 %": JPEG[: len(JPEG) // 2],
    "jpeg cut at 90 %": JPEG[: len(JPEG) * 9 // 10],
    "png cut at 10 %": PNG[: len(PNG) // 10],
    "png cut at 50 %": PNG[: len(PNG) // 2],
    "png cut at 90 %": PNG[: len(PNG) * 9 // 10],
    "webp cut in half": WEBP[: len(WEBP) // 2],
    "png with a broken checksum": crc_broken(),
    "177 megapixels": huge_png(13300, 13300),
    "25.1 megapixels": huge_png(5020, 5000),
    "1 x 30000": saved("PNG", Image.new("RGB", (1, 30000))),
    "65500 wide": saved("JPEG", Image.new("L", (65500, 8))),
    "zero wide": huge_png(0, 100),
    "2 billion wide": huge_png(2**31 - 1, 2**31 - 1),
    "text of 64 MB": png_with(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(64_000_000))),
}
GOOD_IMAGES = {
    "16 bit": saved("PNG", Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)),
    "palette": saved("PNG", Image.fromarray(picture()).convert("P")),
    "palette with a hole": saved("PNG", Image.fromarray(picture()).convert("P"), transparency=3),
    "grey and alpha": saved("PNG", Image.fromarray(picture()[..., :2], "LA")),
    "alpha": saved("PNG", Image.fromarray(np.dstack([picture(), picture()[..., 0]]), "RGBA")),
    "one bit": saved("PNG", Image.fromarray(picture()).convert("1")),
    "cmyk": saved("JPEG", Image.fromarray(picture()).convert("CMYK")),
    "mpo": saved("MPO", save_all=True, append_images=[Image.fromarray(picture(seed=1))]),
    "moving webp": saved("WEBP", save_all=True, append_images=[Image.fromarray(picture(seed=1))]),
    "moving png": saved("PNG", save_all=True, append_images=[Image.fromarray(picture(seed=1))]),
    "broken exif": saved("JPEG", exif=BAD_EXIF),
    "exif of position": saved(
        "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x25\x88\x04\x00\x01\x00\x00\x00\xff\xff\xff\x7f\x00\x00\x00\x00"
    ),
    "jpeg and html": JPEG + b"<html><script>alert(1)</script></html>",
    "png and zip": PNG + zipped(),
    "profile of 64 MB": png_with(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(64_000_000))),
    "text chunk": saved("PNG", pnginfo=(lambda i: (i.add_text("Author", "A Name"), i)[1])(PngImagePlugin.PngInfo())),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_usable_photo_is_refused_with_its_code(live: Live, name: str) -> None:
    content = NOT_IMAGES[name]
    statuses = {
        "upload_too_large": 413,
        "too_many_pixels": 413,
        "not_an_image": 415,
        "unsupported_format": 415,
        "truncated": 422,
        "too_small": 422,
    }
    good = ("photo.png", png(), "image/png")
    for files in (
        {"target": ("photo.png", content, "image/png")},
        {"target": good, "reference": ("photo.png", content)},
        {"target": good, "mask": ("photo.png", content)},
    ):
        answer = live.client.post("/api/v1/jobs", files=files, data={"prompt": "bob"})
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json" and problem["detail"]
        assert answer.status_code == problem["status"] == statuses[problem["code"]]
    answer = live.client.post("/api/v1/preview", files={"target": ("photo.png", content)})
    assert answer.status_code == statuses[answer.json()["code"]]


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_odd_but_good_photos_are_taken_and_stripped(live: Live, name: str) -> None:
    answer = live.client.post("/api/v1/jobs", files={"target": ("x.exe", GOOD_IMAGES[name], "text/html")}, data={"prompt": "bob"})
    assert answer.status_code == 202
    done = live.wait(answer.json()["id"])
    assert (done["result"]["width"], done["result"]["height"]) == (96, 128)
    result = Image.open(io.BytesIO(live.client.get(done["result"]["url"]).content))
    assert (result.format, result.mode, result.info) == ("PNG", "RGB", {})


def test_a_bomb_costs_neither_time_nor_memory(live: Live) -> None:
    bomb = huge_png(13300, 13300)
    before = resident_bytes()

    def send() -> None:
        assert live.post(target=bomb, prompt="bob").json()["code"] == "too_many_pixels"

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resident_bytes() - before < 100 * 2**20


OPTIONS = {
    "no steps": {"steps": "0"},
    "negative steps": {"steps": "-5"},
    "1e9 steps": {"steps": "1e9"},
    "many steps": {"steps": "1000000000"},
    "steps not a number": {"steps": "NaN"},
    "half a step": {"steps": "2.5"},
    "guidance not a number": {"guidance": "nan"},
    "endless guidance": {"guidance": "Infinity"},
    "minus guidance": {"guidance": "-1"},
    "seed of 2^64": {"seed": str(2**64)},
    "seed of many digits": {"seed": "9" * 5000},
    "negative seed": {"seed": "-1"},
    "no such face": {"face": "-1"},
    "face of words": {"face": "mine"},
    "long prompt": {"prompt": "x" * 501},
    "unknown field": {"colour": "red"},
    "unknown field with dots": {"../../etc": "x"},
    "text as reference": {"reference": "not a file"},
    "text as mask": {"mask": "not a file"},
    "unknown mode": {"mode": "color"},
    "strength above one": {"strength": "1.01"},
    "strength not a number": {"strength": "nan"},
    "unknown length": {"length": "endless"},
    "unknown curl": {"curl": "x" * 2000},
    "unknown color": {"color": "Black"},
    "unknown bangs": {"bangs": "none"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option_is_422_and_named(live: Live, name: str) -> None:
    ((field, value),) = OPTIONS[name].items()
    answer = live.client.post("/api/v1/jobs", files={"target": png()}, data={"prompt": "bob"} | {field: value})
    assert answer.status_code == 422 and answer.json()["code"] == "invalid_form" and field[:40] in answer.json()["detail"]


def test_words_of_any_script_are_taken_and_control_characters_are_not(live: Live) -> None:
    answer = live.post(prompt="\x00tóc xoăn 💇 \u202e웨이브\r\n\x1b[31m")
    live.wait(answer.json()["id"])
    assert live.engine.seen[-1].prompt == "tóc xoăn 💇 \u202e웨이브 [31m"


def test_missing_and_surplus_parts(live: Live) -> None:
    post, good = live.client.post, ("a.png", png())
    cases = {
        "no target": post("/api/v1/jobs", files={"reference": good}, data={"prompt": "bob"}),
        "nothing wanted": post("/api/v1/jobs", files={"target": good}),
        "empty words": post("/api/v1/jobs", files={"target": good}, data={"prompt": " \n "}),
        "empty file fields": post("/api/v1/jobs", files={"target": ("", b"")}, data={"prompt": "bob"}),
        "two prompts": post("/api/v1/jobs", files={"target": good}, data={"prompt": ["bob", "long"]}),
        "two targets": post("/api/v1/jobs", files=[("target", good), ("target", good)], data={"prompt": "bob"}),
        "prompt as a file": post("/api/v1/jobs", files={"target": good, "prompt": ("p", b"bob")}),
        "preview of nothing": post("/api/v1/preview", data={"prompt": "bob"}, files={"x": b""}),
    }
    assert {name: (answer.status_code, answer.json()["code"]) for name, answer in cases.items()} == dict.fromkeys(
        cases, (422, "invalid_form")
    )
    flood = post("/api/v1/jobs", files={"target": good}, data={f"f{i}": "1" for i in range(10_000)})
    assert (flood.status_code, flood.json()["code"]) == (400, "malformed_request")
    four = post("/api/v1/jobs", files=[("target", good)] * 4)
    assert (four.status_code, four.json()["code"]) == (400, "malformed_request")
    empty_reference = post("/api/v1/jobs", files={"target": good, "reference": ("", b"")}, data={"prompt": "bob", "seed": ""})
    assert empty_reference.status_code == 202


@pytest.mark.parametrize(
    "name", ["../../x.png", "..\\..\\x.png", "%2e%2e%2fx.png", "a\\x00.png", "x" * 300 + ".png", "CON", "\u202egnp.x", "x.png/", ""]
)
def test_a_clients_file_name_is_never_used(live: Live, name: str) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="target"; filename="%b"\r\n\r\n%b\r\n' % (name.encode(), png())
    body += b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nbob\r\n--B--\r\n'
    answer = live.client.post("/api/v1/jobs", content=body, headers={"content-type": "multipart/form-data; boundary=B"})
    assert answer.status_code == 202 and live.wait(answer.json()["id"])["state"] == "succeeded"
    folder = live.app.state.service.config.paths.jobs
    assert {path.name for path in folder.rglob("*.png")} <= {"target.png", "reference.png", "brush.png", "result.png", "mask.png"}


MALFORMED = {
    "no boundary": ("multipart/form-data", b"--B\r\n"),
    "junk before the boundary": ("multipart/form-data; boundary=B", b"junk" * 1000),
    "no end": ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="target"; filename="a"\r\n\r\nxx'),
    "part without a name": ("multipart/form-data; boundary=B", b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n"),
    "part without headers": ("multipart/form-data; boundary=B", b"--B\r\n\r\nx\r\n--B--\r\n"),
    "header without end": ("multipart/form-data; boundary=B", b"--B\r\n" + b"A" * 100_000),
    "many headers": ("multipart/form-data; boundary=B", b"--B\r\n" + b"A: b\r\n" * 20_000),
    "long boundary": ("multipart/form-data; boundary=" + "B" * 5000, b"--B--\r\n"),
    "strange charset": ("multipart/form-data; boundary=B; charset=\xff", b"--B--\r\n"),
    "nothing": ("multipart/form-data; boundary=B", b""),
    "a field of 1 MB": (
        "multipart/form-data; boundary=B",
        b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 10**6 + b"\r\n--B--\r\n",
    ),
    "json": ("application/json", b'{"target": 1}'),
    "deep json": ("application/json", b"[" * 100_000),
    "json as text, which any site may post": ("text/plain", b'{"target": 1}'),
    "form without files": ("application/x-www-form-urlencoded", b"target=1&prompt=bob"),
    "no type": ("", b"x"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("path", ["/api/v1/jobs", "/api/v1/preview"])
def test_a_malformed_body_is_refused(live: Live, name: str, path: str) -> None:
    kind, body = MALFORMED[name]
    answer = live.client.post(path, content=body, headers={b"content-type": kind.encode("latin-1")})
    assert answer.status_code in (400, 413, 415, 422) and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] in ("malformed_request", "not_multipart", "invalid_form", "upload_too_large")


# Sizes


def test_a_file_over_the_limit_is_413_and_one_below_is_not(live: Live) -> None:
    at_limit = png() + bytes(LIMIT_MB * 2**20 - len(png()))
    assert live.post(target=at_limit, prompt="bob").status_code == 202
    answer = live.post(target=at_limit + b"x", prompt="bob")
    assert answer.status_code == 413 and answer.json()["code"] == "upload_too_large"


@contextlib.contextmanager
def raw(live: Live, head: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        yield connection


def status_of(connection: socket.socket) -> int:
    answer = b""
    with contextlib.suppress(OSError):
        while b"\r\n" not in answer:
            received = connection.recv(4096)
            if not received:
                break
            answer += received
    return int(answer.split()[1]) if answer else 0


HEAD = "POST /api/v1/jobs HTTP/1.1\nHost: localhost\nContent-Type: multipart/form-data; boundary=B"


def test_a_gibibyte_without_a_length_is_refused_before_it_is_read(live: Live) -> None:
    piece, sent = b"10000\r\n" + bytes(65536) + b"\r\n", 0
    start = b'--B\r\nContent-Disposition: form-data; name="target"; filename="a"\r\n\r\n'
    before = resident_bytes()
    with raw(live, HEAD + "\nTransfer-Encoding: chunked") as connection:
        connection.sendall(b"%x\r\n%b\r\n" % (len(start), start))
        with contextlib.suppress(OSError):
            while sent < 2**30:
                connection.sendall(piece)
                sent += 65536
        assert status_of(connection) == 413
    assert sent < 64 * 2**20 and resident_bytes() - before < 50 * 2**20


def test_an_announced_gibibyte_is_refused_before_a_byte_comes(live: Live) -> None:
    with raw(live, HEAD + f"\nContent-Length: {2**30}") as connection:
        assert status_of(connection) == 413


def test_a_lying_length_is_no_servers_fault(live: Live) -> None:
    with raw(live, HEAD + "\nContent-Length: 5") as connection:  # more comes than was said
        connection.sendall(b"--B--\r\nmore than five bytes")
        assert status_of(connection) in (400, 422)
    with raw(live, HEAD + "\nContent-Length: 500") as connection:  # less comes, then the line is cut
        connection.sendall(b"--B\r\n")
    for bad in ("-1", "1e3", "0x10", "5, 6", "9" * 30):
        with raw(live, HEAD + f"\nContent-Length: {bad}") as connection:
            assert status_of(connection) in (400, 413)
    assert live.client.get("/healthz").status_code == 200


def test_a_client_that_goes_away_is_no_servers_fault(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with raw(live, HEAD + "\nTransfer-Encoding: chunked") as connection:
        connection.sendall(b"5\r\n--B\r\n\r\n")
    job = live.post(prompt="bob", steps=50).json()["id"]
    with raw(live, f"GET /api/v1/jobs/{job}/events HTTP/1.1\nHost: localhost") as connection:
        assert status_of(connection) == 200
    assert live.wait(job)["state"] == "succeeded"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_slow_body_is_given_up(tmp_path: Path) -> None:
    from backend.app.uploads import BodyLimit

    with serving(app_config(tmp_path)) as live:
        layer = live.app.middleware_stack
        while not isinstance(layer, BodyLimit):
            layer = getattr(layer, "_app", None) or layer.app
        layer._timeout_s = 0.2
        with raw(live, HEAD + "\nContent-Length: 500") as connection:
            connection.sendall(b"--B\r\n")
            assert status_of(connection) == 408


def test_an_error_of_our_own_is_a_problem_without_its_inside_and_is_counted(tmp_path: Path) -> None:
    with serving(app_config(tmp_path)) as live:
        live.engine.preview = None  # type: ignore[method-assign, assignment]
        answer = live.client.post("/api/v1/preview", files={"target": png()})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal") and "NoneType" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert 'route="/api/v1/preview",status="500"} 1' in live.client.get("/metrics").text


# Addresses and who asks


@pytest.mark.parametrize(
    "job_id", ["x", "..", "%2e%2e%2fjobs.sqlite", "..%5c..", "a" * 5000, "%00", "jobs.sqlite", "'; drop table jobs; --", "💇"]
)
@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("DELETE", ""), ("GET", "/result"), ("GET", "/mask"), ("GET", "/events")])
def test_an_id_that_is_none_is_404(live: Live, job_id: str, method: str, tail: str) -> None:
    answer = live.client.request(method, f"/api/v1/jobs/{job_id}{tail}")
    assert answer.status_code in (404, 405) and answer.json()["code"] in ("not_found", "method_not_allowed")


def test_unknown_addresses_and_methods_are_problems(live: Live) -> None:
    cases = [
        ("GET", "/nothing", 404),
        ("GET", "/static/../api.py", 404),
        ("GET", "/static/%2e%2e/api.py", 404),
        ("PUT", "/api/v1/jobs", 405),
    ]
    cases += [
        ("GET", "/api/v1/preview", 405),
        ("POST", "/healthz", 405),
        ("BREW", "/healthz", 405),
        ("GET", "/docs", 404),
        ("GET", "/static/", 404),
    ]
    for method, path, status in cases:
        answer = live.client.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


def test_a_wrong_method_is_told_all_right_ones(live: Live) -> None:
    answers = {path: live.client.request("PATCH", path) for path in ("/api/v1/jobs/x", "/api/v1/jobs", "/healthz")}
    assert [(answer.status_code, answer.headers["allow"]) for answer in answers.values()] == [
        (405, "DELETE, GET"),
        (405, "POST"),
        (405, "GET"),
    ]


def test_many_ranges_are_no_work(live: Live) -> None:
    job = live.wait(live.post(prompt="bob").json()["id"])["id"]
    ranges = {"range": "bytes=" + ",".join(f"{i}-{i}" for i in range(2000))}

    def best(path: str, headers: dict[str, str]) -> float:
        """The shortest of five answers, in s."""
        times = []
        for _ in range(5):
            start = time.monotonic()
            assert live.client.get(path, headers=headers).status_code in (200, 206, 400, 416, 431)
            times.append(time.monotonic() - start)
        return min(times)

    for path in ("/", "/static/style.css", f"/api/v1/jobs/{job}/result"):
        assert best(path, ranges) < 50 * best(path, {})


def test_another_name_or_another_site_is_refused(live: Live) -> None:
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8000", "[", ""):
        answer = live.client.get("/api/v1/models", headers={"host": host})
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_host")
    for origin in ("http://evil.example", "null", f"https://localhost:{live.port + 1}"):
        answer = live.client.post("/api/v1/models/reload", headers={"origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers
    own = {"host": f"localhost:{live.port}", "origin": f"http://localhost:{live.port}"}
    assert live.client.get("/api/v1/models", headers=own).status_code == 200


def test_one_other_origin_and_a_key_can_be_set(tmp_path: Path) -> None:
    origin = "https://salon.example"
    with serving(app_config(tmp_path, api_key=KEY, cors_origin=origin, allowed_hosts=("try.example",))) as live:
        get = live.client.get
        preflight = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert live.client.options("/api/v1/jobs", headers=preflight).headers["access-control-allow-origin"] == origin
        answer = get("/api/v1/models", headers={"origin": origin, "authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert get("/api/v1/models", headers={"host": "try.example", "x-api-key": KEY}).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"x-api-key": ""},
            {"x-api-key": "é".encode("latin-1")},
        ):
            refused = get("/api/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (401, "bad_api_key") and refused.headers["www-authenticate"]
        assert get("/metrics").status_code == 401
        assert [get(path).status_code for path in ("/", "/healthz", "/readyz")] == [200, 200, 200]


def test_every_answer_carries_the_security_headers(live: Live) -> None:
    answers = [live.client.get(path) for path in ("/", "/healthz", "/nothing", "/static/app.js", "/api/v1/models")]
    answers += [live.client.get("/", headers={"host": "evil.example"}), live.post(target=b"x", prompt="bob")]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] in ("no-store", "no-cache") and "server" not in answer.headers


def test_after_all_that_the_server_works_and_keeps_nothing_extra(live: Live) -> None:
    job = live.wait(live.post(prompt="bob").json()["id"])
    assert job["state"] == "succeeded"
    text = live.client.get("/metrics").text
    assert 'status="500"' not in text and "deephair_jobs_waiting 0" in text
    json.dumps(live.client.get("/api/v1/openapi.json").json())
