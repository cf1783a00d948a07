"""Start the demo deployment from Python, ask it once, and stop it: `python examples/launch.py`."""

import json
import urllib.request

import pdlaunch

config = pdlaunch.load_config(settings={"kv_cache_memory": "64MiB"})
report = pdlaunch.check(config)
for finding in report.findings:
    print(finding.severity, finding.rule, finding.message)  # noqa: T201
if not report.is_ok():
    raise SystemExit("not started")
print(len(pdlaunch.plan(config).processes), "processes")  # noqa: T201

with pdlaunch.Launch(config) as launch:
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{launch.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        print(json.load(response)["choices"][0]["text"])  # noqa: T201
