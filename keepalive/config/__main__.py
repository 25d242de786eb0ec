import json
import sys

from keepalive.config.schema import schema

sys.stdout.write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
