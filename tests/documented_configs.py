"""Serve configs in every way that Ray's own documentation writes them, in words of our own.

The form is the documentation's (which keys, in which order and nesting, quoted or not); names,
values and models are made up. The remarks say which page or sample has that form.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

# -- Serve: production guide, config files, guides on single options ----------------------------

SERVE = {
    # serve/production-guide/config: the least that a config may say, and `serve build` output
    "only an import path": """
applications:
- import_path: shop.main:app
""",
    "a dotted import path": """
applications:
- import_path: shop.graph.entry
""",
    "the production guide": """
proxy_location: EveryNode

http_options:
  host: 0.0.0.0
  port: 8000

applications:
- name: reader
  route_prefix: /
  import_path: reader:app
  runtime_env:
    pip:
      - torch
      - sentencepiece
  deployments:
  - name: Rewriter
    num_replicas: 1
    user_config:
      language: vietnamese
  - name: Shortener
    num_replicas: 1
""",
    "serve build": """
# This file was generated using the `serve build` command on Ray v2.60.0.

proxy_location: EveryNode

http_options:
  host: 0.0.0.0
  port: 8000

grpc_options:
  port: 9000
  grpc_servicer_functions: []

logging_config:
  encoding: TEXT
  log_level: INFO
  logs_dir: null
  enable_access_log: true
  additional_log_standard_attrs: []

applications:
- name: app1
  route_prefix: /
  import_path: reader:app
  runtime_env: {}
  deployments:
  - name: Rewriter
    num_replicas: 1
    user_config:
      language: french
  - name: Shortener
""",
    "serve build with every autoscaling field": """
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
grpc_options: {port: 9000, grpc_servicer_functions: []}
applications:
- name: app1
  route_prefix: /
  import_path: frames:app
  runtime_env: {}
  deployments:
  - name: Splitter
    num_replicas: "auto"
    max_ongoing_requests: 3
    autoscaling_config:
      min_replicas: 1
      initial_replicas: null
      max_replicas: 24
      target_ongoing_requests: 1.5
      metrics_interval_s: 10.0
      look_back_period_s: 45.0
      smoothing_factor: 1.0
      upscale_smoothing_factor: null
      downscale_smoothing_factor: null
      upscaling_factor: null
      downscaling_factor: null
      downscale_delay_s: 300.0
      downscale_to_zero_delay_s: null
      upscale_delay_s: 20.0
      aggregation_function: mean
    ray_actor_options:
      num_cpus: 3.0
      num_gpus: 1.0
""",
    "every part of the format": """
proxy_location: HeadOnly
http_options:
  host: 127.0.0.1
  port: 8123
  request_timeout_s: 30
  keep_alive_timeout_s: 15
applications:
- name: one
  route_prefix: /one
  import_path: one:app
  runtime_env: {}
  deployments:
  - name: A
    num_replicas: 2
  - name: B
""",
    "no proxy": """
proxy_location: Disabled
applications:
- {name: inner, route_prefix: null, import_path: "inner:app"}
""",
    # serve/multi-app
    "several applications": """
proxy_location: EveryNode

http_options:
  host: 0.0.0.0
  port: 8000

applications:
  - name: pictures
    route_prefix: /see
    import_path: pictures:app
    runtime_env: {}
    deployments:
    - name: Fetcher
    - name: Looker

  - name: words
    route_prefix: /say
    import_path: words:app
    runtime_env: {}
    deployments:
    - name: Speaker
""",
    "one application calls another": """
applications:
  - name: front
    import_path: front:app
    route_prefix: /front
    args: {behind: back}
  - name: back
    import_path: back:app
    route_prefix: null
""",
    # serve/http-guide, haproxy-guide
    "http options with TLS": """
http_options:
  host: "::"
  port: 8443
  root_path: /ai
  request_timeout_s: 12.5
  keep_alive_timeout_s: 90
  ssl_keyfile: /etc/tls/tls.key
  ssl_certfile: /etc/tls/tls.crt
  ssl_keyfile_password: null
  ssl_ca_certs: /etc/tls/ca.crt
applications: [{import_path: "safe:app"}]
""",
    # serve/advanced-guides/grpc-guide
    "gRPC": """
grpc_options:
  port: 9100
  grpc_servicer_functions:
    - shop_pb2_grpc.add_OrdersServicer_to_server
    - shop_pb2_grpc.add_StockServicer_to_server
  request_timeout_s: 20
  enable_reflection: false

applications:
  - name: orders
    route_prefix: /orders
    import_path: orders:g
    runtime_env: {}
  - name: stock
    route_prefix: /stock
    import_path: orders:g2
    runtime_env: {}
""",
    # serve/monitoring: logging in three places
    "logging everywhere": """
logging_config:
  log_level: DEBUG
  logs_dir: /var/log/serve
  encoding: JSON
  enable_access_log: false
  additional_log_standard_attrs: [name]
applications:
  - name: loud
    import_path: loud:app
    logging_config: {log_level: WARNING, encoding: TEXT}
    deployments:
      - name: Quiet
        logging_config:
          log_level: ERROR
          enable_access_log: false
""",
    "logging with a level that is a number": """
logging_config: {log_level: 20}
applications: [{import_path: "loud:app"}]
""",
    "tracing": """
tracing_config:
  enabled: true
  sampling_ratio: 0.25
applications: [{import_path: "traced:app"}]
""",
    "controller options": """
controller_options:
  runtime_env: {env_vars: {RAY_SERVE_LOG_ENCODING: "JSON"}}
applications: [{import_path: "m:app"}]
""",
    # serve/production-guide/handling-dependencies: runtime_env in its forms
    "remote working_dir": """
applications:
- name: code
  import_path: main.entry
  runtime_env:
    working_dir: "https://github.com/someone/code/archive/0123abc.zip"
""",
    "working_dir in buckets": """
applications:
- {name: s3, route_prefix: /s3, import_path: "a:b", runtime_env: {working_dir: "s3://b/c.zip"}}
- {name: gs, route_prefix: /gs, import_path: "a:b", runtime_env: {working_dir: "gs://b/c.zip"}}
""",
    "py_modules": """
applications:
- import_path: main:app
  runtime_env:
    py_modules:
      - "s3://code/lib-1.0.zip"
      - "https://example.org/more.zip"
""",
    "a folder on every node": """
applications:
- import_path: main:app
  runtime_env: {working_dir: "local:///srv/app"}
""",
    "pip as a mapping": """
applications:
- import_path: main:app
  runtime_env:
    pip: {packages: [pandas, "scipy==1.14.0"], pip_check: false}
    env_vars: {OMP_NUM_THREADS: "4", MODE: production}
""",
    "uv and conda": """
applications:
- name: uv
  route_prefix: /uv
  import_path: main:app
  runtime_env: {uv: [einops]}
- name: conda
  route_prefix: /conda
  import_path: main:app
  runtime_env: {conda: {dependencies: [pip, {pip: [einops]}]}}
""",
    "a runtime_env for one deployment": """
applications:
- import_path: main:app
  runtime_env: {env_vars: {WHERE: application}}
  deployments:
  - name: Old
    ray_actor_options:
      runtime_env: {pip: ["numpy==1.26.4"], env_vars: {WHERE: deployment}}
""",
    # serve/advanced-guides/multi-app-container
    "containers": """
applications:
  - name: ears
    import_path: ears:entry
    route_prefix: /ears
    runtime_env: {image_uri: "registry.example.org/ears:3"}
  - name: eyes
    import_path: eyes:app
    route_prefix: /eyes
    runtime_env:
      container:
        image: registry.example.org/eyes:7
        worker_path: /opt/ray/default_worker.py
        run_options: ["--log-level=debug"]
""",
    # serve/advanced-guides/app-builder-guide
    "a builder with arguments": """
applications:
- name: hello
  import_path: hello:build
  args:
    message: good morning
    retries: 3
    parts: [{size: 1}, {size: 2.5, tags: [a, b]}]
""",
    # serve/advanced-guides/inplace-updates
    "user_config": """
applications:
- name: default
  import_path: reader:app
  deployments:
  - name: Rewriter
    user_config:
      language: german
      thresholds: {low: 0.1, high: 0.9}
      words: [so, and, so]
""",
    # serve/configure-serve-deployment, serve/resource-allocation
    "all of a deployment's options": """
applications:
- import_path: main:app
  deployments:
  - name: Everything
    num_replicas: 2
    max_ongoing_requests: 20
    max_queued_requests: 100
    user_config: {key: value}
    graceful_shutdown_wait_loop_s: 1.5
    graceful_shutdown_timeout_s: 15
    health_check_period_s: 4
    health_check_timeout_s: 25
    rolling_update_percentage: 0.5
    max_surge_percent: 25
    ray_actor_options:
      num_cpus: 0.5
      num_gpus: 0.25
      memory: 1073741824
      resources: {disk: 0.1, "node:10.0.0.4": 0.001}
      accelerator_type: T4
""",
    "replicas of part of a GPU": """
applications:
- import_path: main:app
  deployments:
  - name: First
    ray_actor_options: {num_gpus: 0.5}
  - name: Second
    ray_actor_options: {num_cpus: 1, num_gpus: 0.5}
""",
    "labels instead of resources": """
applications:
- import_path: main:app
  deployments:
  - name: Picky
    ray_actor_options:
      num_cpus: 1
      label_selector: {"ray.io/accelerator-type": H100, region: "!us-east-1"}
      fallback_strategy: [{label_selector: {"ray.io/accelerator-type": A100}}]
""",
    "back pressure": """
applications:
- import_path: main:app
  deployments:
  - name: Busy
    max_queued_requests: 10
    backpressure_config: {status_code: 429, retry_after_s: 1.5}
""",
    # serve/autoscaling-guide, advanced-autoscaling
    "num_replicas auto": """
applications:
- import_path: resnet:app
  deployments:
  - name: Model
    num_replicas: auto
""",
    "auto with bounds": """
applications:
- import_path: resnet:app
  deployments:
  - name: Model
    max_ongoing_requests: 8
    num_replicas: auto
    autoscaling_config:
      target_ongoing_requests: 4
      min_replicas: 2
      max_replicas: 60
""",
    "scale to zero": """
applications:
- import_path: resnet:app
  deployments:
  - name: Model
    autoscaling_config:
      min_replicas: 0
      initial_replicas: 1
      max_replicas: 7
      upscale_delay_s: 3
      downscale_delay_s: 60
      downscale_to_zero_delay_s: 600
      upscaling_factor: 0.3
      downscaling_factor: 0.6
""",
    "aggregated by the maximum": """
applications:
- import_path: resnet:app
  deployments:
  - name: Model
    autoscaling_config: {min_replicas: 1, max_replicas: 4, aggregation_function: max}
""",
    "an own autoscaling policy": """
applications:
- name: default
  import_path: batch:app
  deployments:
  - name: Batch
    max_ongoing_requests: 4
    autoscaling_config:
      min_replicas: 1
      max_replicas: 12
      policy:
        policy_function: policies:by_the_clock
""",
    "a policy with arguments": """
applications:
- name: default
  import_path: consumer:app
  deployments:
  - name: Consumer
    autoscaling_config:
      min_replicas: 1
      max_replicas: 9
      target_ongoing_requests: 3
      policy:
        policy_function: "policies:QueuePolicy"
        policy_kwargs:
          broker_url: "redis://queue:6379/1"
          queue_name: "jobs"
""",
    # serve/advanced-guides/external-scaling-webhook
    "an external scaler": """
applications:
- name: outer
  import_path: outer:app
  external_scaler_enabled: true
  deployments:
  - name: Worker
    num_replicas: 1
""",
    # serve/advanced-guides/replica-scheduling
    "at most so many on a node": """
applications:
- name: spread
  import_path: spread:app
  deployments:
  - name: Model
    num_replicas: 6
    max_replicas_per_node: 2
""",
    "a placement group for each replica": """
applications:
- import_path: big:app
  deployments:
  - name: Big
    ray_actor_options: {num_cpus: 0, num_gpus: 1}
    placement_group_bundles: [{CPU: 1, GPU: 1}, {GPU: 1}, {CPU: 4, "ssd": 0.5}]
    placement_group_strategy: STRICT_PACK
""",
    "bundles with labels": """
applications:
- import_path: big:app
  deployments:
  - name: Big
    placement_group_bundles: [{CPU: 1}, {CPU: 1}]
    placement_group_strategy: SPREAD
    placement_group_bundle_label_selector: [{zone: a}]
""",
    # serve/advanced-guides/gang-scheduling
    "gangs": """
applications:
- name: gang
  route_prefix: /
  import_path: gang:app
  deployments:
  - name: Member
    num_replicas: 6
    ray_actor_options:
      num_cpus: 0.5
    gang_scheduling_config:
      gang_size: 3
      gang_placement_strategy: SPREAD
      runtime_failure_policy: RESTART_GANG
""",
    "gangs that scale": """
applications:
- import_path: gang:app
  deployments:
  - name: Member
    num_replicas: auto
    autoscaling_config: {min_replicas: 4, max_replicas: 16}
    gang_scheduling_config: {gang_size: 4}
""",
    # serve/advanced-guides/deployment-scoped-actors
    "actors of a deployment": """
applications:
- name: shared
  import_path: shared:app
  deployments:
  - name: Driver
    deployment_actors:
      - name: tally
        actor_class: collections:Counter
        init_kwargs:
          start: 5
        actor_options: {num_cpus: 0}
""",
    # serve/advanced-guides/custom-request-router
    "an own request router": """
applications:
- name: routed
  import_path: routed:app
  deployments:
  - name: Model
    num_replicas: 3
    ray_actor_options: {num_cpus: 0}
    request_router_config:
      request_router_class: routers.Uniform
      request_router_kwargs: {}
      request_routing_stats_period_s: 5
      request_routing_stats_timeout_s: 20
""",
    "a router of Ray's": """
applications:
- import_path: routed:app
  deployments:
  - name: Model
    request_router_config:
      request_router_class: "ray.serve.experimental.round_robin_router:RoundRobinRouter"
      initial_backoff_s: 0.05
      backoff_multiplier: 2
      max_backoff_s: 1
""",
}

# -- KubeRay: what serveConfigV2 holds in ray-operator/config/samples -----------------------------

KUBERAY = {
    "kuberay: two applications with graphs": """
applications:
  - name: bakery
    import_path: bakery.deployment_graph
    route_prefix: /bakery
    runtime_env:
      working_dir: "https://github.com/someone/bakery/archive/78b4a5da3879.zip"
    deployments:
      - name: BreadStand
        num_replicas: 2
        max_replicas_per_node: 1
        user_config:
          price: 4
        ray_actor_options:
          num_cpus: 0.1
      - name: Counter
        num_replicas: 1
        ray_actor_options:
          num_cpus: 0.1
  - name: sums
    import_path: sums.serve_dag
    route_prefix: /sums
    runtime_env:
      working_dir: "https://github.com/someone/bakery/archive/78b4a5da3879.zip"
    deployments:
      - name: Plus
        num_replicas: 1
        user_config:
          increment: 2
        ray_actor_options:
          num_cpus: 0.1
      - name: Chooser
        num_replicas: 1
""",
    "kuberay: another port at the end": """
applications:
  - name: bakery
    import_path: bakery.deployment_graph
    route_prefix: /bakery
    runtime_env: {working_dir: "https://github.com/someone/bakery/archive/master.zip"}
http_options:
  port: 9123
""",
    "kuberay: replicas apart": """
applications:
  - name: apart
    import_path: ops.samples.ray-serve.single:DagNode
    route_prefix: /apart
    deployments:
      - {name: Base, num_replicas: 2, max_replicas_per_node: 1, ray_actor_options: {num_cpus: 0.1}}
""",
    "kuberay: incremental upgrade": """
applications:
  - name: bakery
    import_path: bakery.deployment_graph
    route_prefix: /bakery
    deployments:
      - name: BreadStand
        user_config:
          price: 5
        ray_actor_options:
          num_cpus: 0.5
        max_ongoing_requests: 80
        autoscaling_config:
          min_replicas: 1
          max_replicas: 4
      - name: CakeStand
        num_replicas: 1
        ray_actor_options:
          num_cpus: 0
""",
    "kuberay: pictures": """
applications:
  - name: painter
    import_path: painter.painter:entrypoint
    runtime_env:
      working_dir: "https://github.com/someone/examples/archive/b8af221bc0e5.zip"
      pip: ["diffusers==0.32.2", "transformers==4.48.2"]
""",
    "kuberay: a TPU host": """
applications:
  - name: painter
    import_path: painter.painter_tpu:deployment
    runtime_env:
      working_dir: "https://github.com/someone/examples/archive/refs/heads/master.zip"
      pip:
        - pydantic<2
        - pillow
        - jax[tpu]==0.4.11
        - -f https://storage.example.org/libtpu_releases.html
""",
    "kuberay: variables of the pod": """
applications:
  - name: llm
    import_path: ops.samples.vllm.serve_tpu:model
    deployments:
    - name: Engine
      num_replicas: 1
    runtime_env:
      working_dir: "https://github.com/someone/ops/archive/master.zip"
      env_vars:
        MODEL_ID: "$MODEL_ID"
        DTYPE: "$DTYPE"
        TPU_CHIPS: "8"
""",
    "kuberay: translate and shorten": """
applications:
  - name: text_app
    import_path: text.app
    route_prefix: /shorten_translate
    runtime_env:
      working_dir: "https://github.com/someone/examples/archive/eb49e7cacd84.zip"
      pip:
        - torch
        - transformers
    deployments:
      - name: Translator
        num_replicas: 1
        ray_actor_options:
          num_cpus: 0.2
        user_config:
          language: dutch
""",
    "kuberay: an LLM": """
applications:
- name: llms
  import_path: ray.serve.llm:build_openai_app
  route_prefix: "/"
  args:
    llm_configs:
    - model_loading_config:
        model_id: small-chat
        model_source: someone/Small-Chat-7B
      engine_kwargs:
        dtype: bfloat16
        max_model_len: 2048
        gpu_memory_utilization: 0.75
      deployment_config:
        autoscaling_config:
          min_replicas: 1
          max_replicas: 3
          target_ongoing_requests: 32
        max_ongoing_requests: 64
""",
    "kuberay: an LLM on two nodes": """
applications:
- args:
    llm_configs:
      - model_loading_config:
          model_id: "thinker"
          model_source: "someone/Thinker-600B"
        accelerator_type: "H100"
        deployment_config:
          autoscaling_config:
            min_replicas: 1
            max_replicas: 1
        runtime_env:
          env_vars:
            VLLM_USE_V1: "1"
        engine_kwargs:
          tensor_parallel_size: 8
          pipeline_parallel_size: 2
          gpu_memory_utilization: 0.92
          dtype: "auto"
          max_num_seqs: 40
          max_model_len: 16384
          enable_chunked_prefill: true
          enable_prefix_caching: true
  import_path: ray.serve.llm:build_openai_app
  name: llm_app
  route_prefix: "/"
""",
    "kuberay: throughput": """
applications:
- name: llm_app
  import_path: ray.serve.llm:build_openai_app
  args:
    llm_configs:
        - model_loading_config:
            model_id: quick
            model_source: someone/Quick-4b
          accelerator_type: L4
          deployment_config:
            num_replicas: 4
          engine_kwargs:
            enable_auto_tool_choice: true
            reasoning_parser: qwen3
            tool_call_parser: hermes
""",
}

# -- Ray Serve LLM --------------------------------------------------------------------------------

OPENAI = "applications:\n- import_path: ray.serve.llm:build_openai_app\n  args:\n    llm_configs:\n"

FILES = {
    # serve/llm/quick-start, "Standalone Config"
    "models/small.yaml": """
model_loading_config:
  model_id: small
  model_source: someone/Small-0.5B
accelerator_type: A10G
deployment_config:
  autoscaling_config:
    min_replicas: 1
    max_replicas: 2
""",
    "models/less-small.yaml": """
model_loading_config:
  model_id: less-small
  model_source: someone/Less-Small-1.5B
accelerator_type: A10G
""",
}
"""What stands beside the configs that name files."""

MODULES = {
    "policies.py": """
def by_the_clock(context):
    return 1, {}


class QueuePolicy:
    def __init__(self, **options):
        self.options = options
""",
    "routers.py": "class Uniform: pass\n",
}
"""What the configs name of their own: Ray's schema imports it."""

LLMS = {
    # serve/llm/quick-start
    "quick start": """
applications:
- args:
    llm_configs:
        - model_loading_config:
            model_id: tiny
            model_source: someone/Tiny-0.5B-Instruct
          accelerator_type: A10G
          deployment_config:
            autoscaling_config:
                min_replicas: 1
                max_replicas: 2
        - model_loading_config:
            model_id: small
            model_source: someone/Small-1.5B-Instruct
          accelerator_type: A10G
          deployment_config:
            autoscaling_config:
                min_replicas: 1
                max_replicas: 2
  import_path: ray.serve.llm:build_openai_app
  name: llm_app
  route_prefix: "/"
""",
    "files": """
applications:
- args:
    llm_configs:
        - models/small.yaml
        - ./models/less-small.yaml
  import_path: ray.serve.llm:build_openai_app
  name: llm_app
  route_prefix: "/"
""",
    "a dotted builder": """
applications:
- import_path: ray.serve.llm.build_openai_app
  args: {llm_configs: [{model_loading_config: {model_id: dotted}}]}
""",
    "only a model": OPENAI
    + """
    - model_loading_config:
        model_id: someone/Small-1B
""",
    # serve/llm/user-guides/configuration
    "every field": OPENAI
    + """
    - model_loading_config:
        model_id: everything
        model_source: someone/Everything-8B
        tokenizer_source: someone/Everything-8B-tokenizer
      llm_engine: vLLM
      engine_kwargs: {max_model_len: 4096, max_num_seqs: 32}
      accelerator_type: L40S
      accelerator_config: {kind: gpu}
      placement_group_config: {bundle_per_worker: {CPU: 1, GPU: 1}, strategy: PACK}
      deployment_config: {max_ongoing_requests: 48}
      lora_config: {dynamic_lora_loading_path: "s3://adapters/everything"}
      runtime_env: {env_vars: {A: "b"}}
      experimental_configs: {stream_batching_interval_ms: 20, num_ingress_replicas: 3}
      log_engine_metrics: true
      callback_config: {raise_error_on_callback: false}
""",
    "all deployment options": OPENAI
    + """
    - model_loading_config: {model_id: options, model_source: someone/Options-1B}
      deployment_config:
        name: options-by-hand
        num_replicas: 2
        ray_actor_options: {num_cpus: 2, memory: 2.0e+9, resources: {rack: 0.1}}
        max_ongoing_requests: 64
        max_queued_requests: 200
        user_config: {any: thing}
        health_check_period_s: 20
        health_check_timeout_s: 60
        graceful_shutdown_wait_loop_s: 2
        graceful_shutdown_timeout_s: 120
        logging_config: {log_level: DEBUG}
""",
    "an LLM with num_replicas auto": OPENAI
    + """
    - model_loading_config: {model_id: auto, model_source: someone/Auto-1B}
      deployment_config:
        num_replicas: auto
        autoscaling_config: {max_replicas: 6, target_ongoing_requests: 20}
""",
    "an LLM that scales to zero": OPENAI
    + """
    - model_loading_config: {model_id: llama, model_source: someone/Llama-8B}
      deployment_config:
        autoscaling_config:
          target_ongoing_requests: 1
          min_replicas: 0
          initial_replicas: 0
          max_replicas: 8
      accelerator_type: H100
      engine_kwargs: {tensor_parallel_size: 1}
""",
    # serve/llm/user-guides/multi-lora
    "LoRA": OPENAI
    + """
    - model_loading_config: {model_id: base, model_source: someone/Base-0.5B}
      lora_config:
        dynamic_lora_loading_path: "s3://some-bucket/adapters"
        max_num_adapters_per_replica: 8
        download_timeout_s: 45
        max_download_tries: 5
      engine_kwargs: {enable_lora: true, max_lora_rank: 32, max_loras: 8}
      deployment_config: {autoscaling_config: {min_replicas: 1, max_replicas: 2}}
      accelerator_type: A10G
""",
    # serve/llm/user-guides/cross-node-parallelism
    "tensor parallel": OPENAI
    + """
    - model_loading_config: {model_id: tp, model_source: someone/TP-8B}
      accelerator_type: L4
      engine_kwargs:
        tensor_parallel_size: 2
        distributed_executor_backend: ray
        max_model_len: 8192
""",
    "tensor and pipeline parallel": OPENAI
    + """
    - model_loading_config: {model_id: tp-pp, model_source: someone/TP-PP-70B}
      accelerator_type: A100
      engine_kwargs:
        tensor_parallel_size: 2
        pipeline_parallel_size: 2
        distributed_executor_backend: ray
        enable_chunked_prefill: true
        max_num_batched_tokens: 4096
""",
    "bundles over nodes": OPENAI
    + """
    - model_loading_config: {model_id: wide, model_source: someone/Wide-70B}
      accelerator_type: L4
      engine_kwargs: {tensor_parallel_size: 4}
      placement_group_config:
        bundles:
          - GPU: 1
            CPU: 2
          - GPU: 1
            CPU: 2
          - GPU: 1
            CPU: 2
          - GPU: 1
            CPU: 2
        strategy: SPREAD
""",
    "a bundle for each worker": OPENAI
    + """
    - model_loading_config: {model_id: per-worker, model_source: someone/Worker-13B}
      engine_kwargs: {tensor_parallel_size: 2}
      placement_group_config:
        bundle_per_worker: {CPU: 2, GPU: 1}
        strategy: STRICT_PACK
""",
    # serve/llm/user-guides/fractional-gpu
    "half a GPU": OPENAI
    + """
    - model_loading_config: {model_id: someone/Small-VLM-256M}
      engine_kwargs:
        gpu_memory_utilization: 0.4
        use_tqdm_on_load: false
        enforce_eager: true
        max_model_len: 2048
      deployment_config: {autoscaling_config: {min_replicas: 8, max_replicas: 8}}
      accelerator_type: L4
      placement_group_config: {bundles: [{GPU: 0.49}]}
      runtime_env:
        env_vars: {VLLM_RAY_PER_WORKER_GPUS: "0.49", VLLM_DISABLE_COMPILE_CACHE: "1"}
""",
    # serve/llm/user-guides/vllm-compatibility
    "embeddings": OPENAI
    + """
    - model_loading_config: {model_id: embedder, model_source: someone/Embedder-0.6B}
      engine_kwargs: {runner: pooling, convert: embed}
""",
    "transcription": OPENAI
    + """
    - model_loading_config: {model_id: whisper-like, model_source: someone/Ears-small}
      deployment_config: {autoscaling_config: {min_replicas: 1, max_replicas: 4}}
      accelerator_type: A10G
      log_engine_metrics: true
""",
    "pictures": OPENAI
    + """
    - model_loading_config: {model_id: eyes-12b, model_source: someone/Eyes-12B}
      accelerator_type: L40S
      engine_kwargs:
        tensor_parallel_size: 1
        max_model_len: 8192
        limit_mm_per_prompt: {image: 2}
""",
    "structured output": OPENAI
    + """
    - model_loading_config: {model_id: json, model_source: someone/Json-0.5B}
      engine_kwargs:
        structured_outputs_config: {backend: xgrammar}
""",
    "reasoning and tools": OPENAI
    + """
    - model_loading_config: {model_id: think, model_source: someone/Think-32B}
      engine_kwargs:
        reasoning_parser: deepseek_r1
        enable_auto_tool_choice: true
        tool_call_parser: hermes
        trust_remote_code: true
        quantization: fp8
        kv_cache_dtype: fp8
""",
    "speculative decoding": OPENAI
    + """
    - model_loading_config: {model_id: guess, model_source: someone/Guess-8B}
      engine_kwargs:
        speculative_config: {method: ngram, num_speculative_tokens: 3, prompt_lookup_max: 4}
        compilation_config: {cache_dir: /cache/compiled}
""",
    # serve/llm/user-guides/deployment-initialization
    "a bucket": OPENAI
    + """
        - accelerator_type: A10G
          engine_kwargs:
            max_model_len: 8192
          model_loading_config:
            model_id: mine
            model_source:
              bucket_uri: s3://anonymous@some-bucket/models/mine
""",
    "buckets of other clouds": OPENAI
    + """
    - model_loading_config: {model_id: a, model_source: {bucket_uri: "gs://bucket/a"}}
    - model_loading_config:
        model_id: b
        model_source: {bucket_uri: "abfss://box@account.dfs.core.windows.net/b"}
      runtime_env: {pip: [adlfs, azure-identity]}
    - model_loading_config:
        model_id: c
        model_source:
          bucket_uri: azure://box@account.blob.core.windows.net/c
""",
    "streamed from a bucket": OPENAI
    + """
    - model_loading_config: {model_id: streamed, model_source: "s3://some-bucket/streamed"}
      accelerator_type: L4
      engine_kwargs: {tensor_parallel_size: 1, enforce_eager: true, load_format: runai_streamer}
      runtime_env: {env_vars: {RUNAI_STREAMER_S3_UNSIGNED: "1"}}
""",
    "sharded and streamed from a disk": OPENAI
    + """
    - model_loading_config: {model_id: sharded, model_source: /mnt/models/sharded}
      engine_kwargs: {tensor_parallel_size: 4, load_format: runai_streamer_sharded}
      runtime_env: {env_vars: {RUNAI_STREAMER_CONCURRENCY: "16"}}
""",
    "a gated model": OPENAI
    + """
    - model_loading_config: {model_id: gated, model_source: someone/Gated-8B}
      accelerator_type: A10G
      runtime_env: {env_vars: {HF_TOKEN: hf_not_a_real_one, HF_HUB_ENABLE_HF_TRANSFER: "1"}}
""",
    "a compile cache": OPENAI
    + """
    - model_loading_config: {model_id: cached, model_source: someone/Cached-8B}
      callback_config:
        callback_class: ray.llm._internal.common.callbacks.cloud_downloader.CloudDownloader
        callback_kwargs:
          paths: [["s3://some-bucket/cache", /cache/compiled]]
      engine_kwargs: {compilation_config: {cache_dir: /cache/compiled}}
""",
    # serve/llm/user-guides/callbacks
    "an own callback": OPENAI
    + """
        - model_loading_config:
            model_id: called-back
            model_source: someone/Called-Back
          accelerator_type: A10G
          callback_config:
            callback_class: own_module.OwnCallback
            callback_kwargs:
              own_param: value
            raise_error_on_callback: true
""",
    # serve/llm/user-guides/observability
    "no engine metrics": OPENAI
    + """
        - model_loading_config:
            model_id: silent
            model_source: someone/Silent-0.5B
          accelerator_type: A10G
          log_engine_metrics: false
          engine_kwargs: {disable_log_stats: true}
""",
    # serve/llm/user-guides/tpu
    "a TPU slice": OPENAI
    + """
    - model_loading_config: {model_id: tpu, model_source: /models/tpu-31b}
      accelerator_type: TPU-V6E
      accelerator_config: {kind: tpu, topology: 4x4}
      engine_kwargs: {tensor_parallel_size: 16}
""",
    "TPU chips": OPENAI
    + """
    - model_loading_config: {model_id: chips, model_source: someone/Chips-8B}
      accelerator_type: TPU-V5P
      engine_kwargs: {tensor_parallel_size: 4}
      placement_group_config: {bundle_per_worker: {TPU: 1}}
""",
    "a CPU": OPENAI
    + """
    - model_loading_config: {model_id: cpu, model_source: someone/Slow-0.5B}
      accelerator_config: {kind: cpu}
      engine_kwargs: {max_model_len: 512}
      placement_group_config: {bundle_per_worker: {CPU: 4}}
""",
    # serve/llm/user-guides/prefix-aware-routing, kv-aware-routing
    "prefix-aware routing": OPENAI
    + """
    - model_loading_config: {model_id: prefix, model_source: someone/Prefix-7B}
      engine_kwargs: {enable_prefix_caching: true}
      deployment_config:
        autoscaling_config: {min_replicas: 2, max_replicas: 4}
        request_router_config:
          request_router_class: ray.serve.llm.request_router.PrefixCacheAffinityRouter
          request_router_kwargs:
            imbalanced_threshold: 12
            match_rate_threshold: 0.2
            do_eviction: true
""",
    "sessions": OPENAI
    + """
    - model_loading_config: {model_id: session, model_source: someone/Session-7B}
      deployment_config:
        num_replicas: 3
        request_router_config:
          request_router_class: ray.serve.experimental.round_robin_router.RoundRobinRouter
""",
    # serve/llm/user-guides/kv-cache-offloading
    "offloading": OPENAI
    + """
    - model_loading_config: {model_id: offload, model_source: someone/Offload-0.6B}
      deployment_config:
        autoscaling_config: {min_replicas: 2, max_replicas: 2}
      engine_kwargs:
        enable_prefix_caching: true
        kv_offloading_backend: native
        kv_offloading_size: 8  # GiB
""",
    "LMCache": """
applications:
  - name: with-lmcache
    route_prefix: /
    import_path: ray.serve.llm:build_openai_app
    runtime_env:
      env_vars:
        LMCACHE_LOCAL_CPU: "True"
        LMCACHE_CHUNK_SIZE: "256"
        LMCACHE_MAX_LOCAL_CPU_SIZE: "50"
    args:
      llm_configs:
        - model_loading_config:
            model_id: cached
            model_source: someone/Cached-0.5B
          engine_kwargs:
            tensor_parallel_size: 1
            kv_transfer_config:
              kv_connector: LMCacheConnectorV1
              kv_role: kv_both
""",
    # serve/llm/user-guides/prefill-decode
    "prefill and decode": """
applications:
  - args:
      prefill_config:
        model_loading_config:
          model_id: someone/Apart-8B
        engine_kwargs:
          kv_transfer_config:
            kv_connector: NixlConnector
            kv_role: kv_producer
            engine_id: engine1
        deployment_config:
          autoscaling_config:
            min_replicas: 2
            max_replicas: 4
      decode_config:
        model_loading_config:
          model_id: someone/Apart-8B
        engine_kwargs:
          kv_transfer_config:
            kv_connector: NixlConnector
            kv_role: kv_consumer
            engine_id: engine2
        deployment_config:
          autoscaling_config:
            min_replicas: 5
            max_replicas: 9
    import_path: ray.serve.llm:build_pd_openai_app
    name: apart
    route_prefix: "/"
""",
    "prefill and decode with anchors": """
applications:
  - args:
      prefill_config:
        model_loading_config: {model_id: someone/Apart-8B}
        engine_kwargs:
          kv_transfer_config: &transfer
            kv_connector: LMCacheConnectorV1
            kv_role: kv_both
        deployment_config: {autoscaling_config: {min_replicas: 2, max_replicas: 2}}
        runtime_env: &env
          env_vars:
            LMCACHE_CONFIG_FILE: mooncake.yaml
            LMCACHE_USE_EXPERIMENTAL: "True"
      decode_config:
        model_loading_config: {model_id: someone/Apart-8B}
        engine_kwargs:
          kv_transfer_config: *transfer
        deployment_config: {autoscaling_config: {min_replicas: 1, max_replicas: 1}}
        runtime_env: *env
    import_path: ray.serve.llm:build_pd_openai_app
    name: apart-mooncake
    route_prefix: "/"
""",
    "prefill and decode from one mapping": """
applications:
  - name: apart-merged
    import_path: ray.serve.llm:build_pd_openai_app
    args:
      prefill_config: &one
        model_loading_config: {model_id: apart, model_source: someone/Apart-0.6B}
        deployment_config: {num_replicas: 2, ray_actor_options: {num_cpus: 0.5}}
        engine_kwargs:
          max_model_len: 4096
          gpu_memory_utilization: 0.4
          kv_transfer_config: {kv_connector: NixlConnector, kv_role: kv_both}
      decode_config:
        <<: *one
        runtime_env: {env_vars: {RAY_SERVE_LLM_ENABLE_DECODE_BLOCK_PROGRESS: "1"}}
""",
    "several connectors": """
applications:
  - name: several
    import_path: ray.serve.llm:build_pd_openai_app
    args:
      prefill_config: &half
        model_loading_config: {model_id: half, model_source: someone/Half-0.5B}
        engine_kwargs:
          kv_transfer_config:
            kv_connector: MultiConnector
            kv_role: kv_both
            kv_connector_extra_config:
              connectors:
                - {kv_connector: LMCacheConnectorV1, kv_role: kv_both}
                - {kv_connector: NixlConnector, kv_role: kv_both, backends: ["UCX"]}
      decode_config: *half
""",
    # serve/llm/user-guides/data-parallel-attention
    "data parallel": """
applications:
- name: experts
  route_prefix: /
  import_path: ray.serve.llm:build_dp_openai_app
  args:
    llm_config:
      model_loading_config:
        model_id: someone/Experts-0.5B
      deployment_config:
        num_replicas: 2
      engine_kwargs:
        data_parallel_size: 4
        tensor_parallel_size: 2
        enable_expert_parallel: true
""",
    "data parallel from a file": """
applications:
- import_path: ray.serve.llm:build_dp_openai_app
  args: {llm_config: models/small.yaml}
""",
    "data parallel prefill and decode": """
applications:
- name: experts-apart
  import_path: ray.serve.llm:build_pd_openai_app
  args:
    prefill_config: &experts
      model_loading_config: {model_id: experts, model_source: someone/Experts-16B}
      engine_kwargs:
        data_parallel_size: 2
        tensor_parallel_size: 1
        kv_transfer_config: {kv_connector: NixlConnector, kv_role: kv_both}
      experimental_configs: {NIXL_SIDE_CHANNEL_PORT_BASE: 40000}
    decode_config: *experts
""",
    # serve/llm/architecture, API reference: the ingress
    "an own ingress": """
applications:
- import_path: ray.serve.llm:build_openai_app
  args:
    llm_configs: [{model_loading_config: {model_id: m, model_source: someone/M-1B}}]
    ingress_cls_config:
      ingress_cls: ray.serve.llm.ingress:OpenAiIngress
      ingress_extra_kwargs: {}
    ingress_deployment_config:
      num_replicas: 2
      max_ongoing_requests: 500
      ray_actor_options: {num_cpus: 0.5}
""",
    "LLMs on several routes": """
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
applications:
- name: left
  route_prefix: /left
  import_path: ray.serve.llm:build_openai_app
  args: {llm_configs: [{model_loading_config: {model_id: left, model_source: someone/Left-1B}}]}
- name: right
  route_prefix: /right
  import_path: ray.serve.llm:build_openai_app
  args: {llm_configs: [{model_loading_config: {model_id: right, model_source: someone/R-1B}}]}
""",
    # serve/tutorials/deployment-serve-llm: the app is in a module
    "an LLM in a module": """
applications:
- import_path: serve_big_llm:app
""",
    "another engine's class": OPENAI
    + """
    - model_loading_config: {model_id: served, model_source: someone/Served-8B}
      deployment_config: {autoscaling_config: {min_replicas: 1, max_replicas: 2}}
      server_cls: ray.serve.llm.deployment:LLMServer
      engine_kwargs: {trust_remote_code: true}
""",
}

DOCUMENTED = {**SERVE, **KUBERAY, **LLMS}


def go_where_they_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the files and modules that the configs name, in the folder that is current then."""
    for name, text in {**FILES, **MODULES}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    monkeypatch.chdir(path)
    monkeypatch.syspath_prepend(path)
    importlib.invalidate_caches()
