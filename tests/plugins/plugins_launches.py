"""A process whose CUDA driver is fake_cuda.c's: launches every plugin, and prints what the driver was given.

`python plugins_launches.py LIBRARY < cases.json`. A case: operator, attributes, types, shapes and addresses (of inputs,
then outputs), parameters (P a pointer, I an int32). Prints a JSON list: the launch's line, or the plugin's error."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from plugins.host import Host, PluginError


def main() -> None:
    host = Host(Path(sys.argv[1]))
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_launched.restype = ctypes.c_char_p
    results: list[str] = []
    for case in json.load(sys.stdin):
        plugin = host.create(case["operator"], case["attributes"])
        driver.fake_expect(case["parameters"].encode())
        try:
            plugin.prepare(case["types"], case["shapes"])
            loads = driver.fake_loads()
            plugin.run(case["types"], case["shapes"], case["addresses"], stream=0x77)
            assert driver.fake_loads() == loads, "loaded in a launch: that fails while a graph is captured"
            results.append(driver.fake_launched().decode())
        except PluginError as error:
            results.append(str(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
