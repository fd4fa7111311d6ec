"""What would another GPU, or a smaller batch, change? Two answers side by side, and a grid of them."""

import servecast

scenario = servecast.load("l4-qwen2.5-0.5b")
smaller = scenario.changed({"engine.max_num_seqs": 8})
print(
    servecast.compare(
        scenario, smaller, labels=["as it is", "batch of 8"], seeds=3, request_rate=40, num_requests=200
    )
)

swept = servecast.sweep(
    scenario, {"gpu.name": ["l4", "a6000"], "engine.max_num_seqs": [8, 256]}, rates=[40], num_requests=200
)
print(swept)
