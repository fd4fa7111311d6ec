"""How many requests a second can this serve at these objectives, and how far is the answer to be believed?"""

import servecast

scenario = servecast.load("l4-qwen2.5-0.5b")
answer = servecast.plan(scenario, slo=["ttft:p95:200", "tpot:p95:20"], tolerance=0.1, progress=True)

print(answer)
print(f"\n{answer.max_request_rate:g} requests/s, latencies within {answer.error_band:.0%}")
print(answer.probes[["request_rate", "state", "ttft:p95:200", "tpot:p95:20"]].to_string(index=False))
print("Page:", answer.to_html("out/plan.html"))
