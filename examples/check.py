"""Can a benchmark's report be true, and does it agree with the prediction?"""

from pathlib import Path

import servecast

table = Path("report.csv")
table.write_text(
    "concurrency,ttft_p50_ms,ttft_p95_ms,e2e_p50_ms,req_s,output_tok_s\n"
    "1,20,25,700,1.4,180\n"
    "8,30,24,900,8.8,1130\n"  # its p95 is below its median
)
checked = servecast.check(
    table, model_config="Qwen2.5-0.5B-Instruct", gpu="l4", prompt_tokens=64, output_tokens=128
)
print(checked)
for finding in checked.findings:
    print(f"{finding.rule}: {finding.message}")

print(servecast.check("l4-qwen2.5-0.5b", predict=False))
