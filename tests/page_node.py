"""The page's modules in Node, without a browser: a document of empty elements, and a server that answers what a test tells it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from backend.app.api import STATIC

# ``server(path, options, times)`` is the test's: gives [status, body], body being an object, a text, or an array of events, and times how often
# the path was asked for before; what it throws is a broken connection.
HARNESS = """
class Element {
  constructor() {
    this.dataset = {}; this.style = { setProperty() {} }; this.children = []; this.attributes = {}; this.parts = {}; this.names = new Set();
    this.classList = { toggle: (name, on) => (on ? this.names.add(name) : this.names.delete(name)), contains: (name) => this.names.has(name),
                       add: (name) => this.names.add(name), remove: (name) => this.names.delete(name) };
  }
  querySelector(wanted) { return (this.parts[wanted] ??= new Element()); }
  querySelectorAll() { return []; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  setAttribute(name, value) { this.attributes[name] = value; }
  removeAttribute(name) { delete this.attributes[name]; }
  hasAttribute(name) { return name in this.attributes; }
  addEventListener() {}
  focus() {}
}
const elements = {};
globalThis.document = {
  getElementById: (id) => (elements[id] ??= new Element()), querySelectorAll: () => [], querySelector: () => new Element(),
  documentElement: new Element(), addEventListener() {}, createElement: () => new Element(), createElementNS: () => new Element(),
};
globalThis.ResizeObserver = class { observe() {} };
globalThis.addEventListener = () => {};
globalThis.matchMedia = () => ({ matches: false });
if (!globalThis.navigator) globalThis.navigator = { language: "en" };
globalThis.localStorage = { getItem: () => "en", setItem() {} };
const kept = {};
globalThis.sessionStorage = { getItem: (key) => kept[key] ?? null, setItem: (key, value) => (kept[key] = value) };
const asked = [];
globalThis.fetch = async (path, options = {}) => {
  const key = `${options.method ?? "GET"} ${path}`;
  const times = asked.filter((one) => one === key).length;
  asked.push(key);
  if (asked.length > 500) process.exit(9);
  let answer;
  try { answer = server(path, options, times); } catch { throw new TypeError("fetch failed"); }
  const [status, body] = answer;
  const events = (list) => list.map((data, n) => `id: b-${n}\\nevent: ${"state" in data ? "state" : "progress"}\\ndata: ${JSON.stringify(data)}\\n\\n`);
  const text = Array.isArray(body) ? events(body).join("") : typeof body === "string" ? body : JSON.stringify(body);
  return new Response(status === 204 ? null : text, { status });
};
const pauses = [];
globalThis.setTimeout = (resume, milliseconds) => { pauses.push(milliseconds); setImmediate(resume); };
const told = (value) => process.stdout.write(JSON.stringify(value));
const problem = (status, code, more = {}) => [status, { code, status, detail: "told", ...more }];
"""


def in_node(folder: Path, script: str) -> Any:
    """What ``script`` told, as JSON. It may import the page's modules from "./static/". Skips the test where there is no Node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node on this machine (Debian: apt install nodejs)")
    shutil.copytree(STATIC, folder / "static", ignore=shutil.ignore_patterns("gallery"))
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "story.js").write_text(HARNESS + script)
    done = subprocess.run([node, "story.js"], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
