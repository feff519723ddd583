"""Which modules decide what a stage writes: all that its entry modules import.

Held by tests/builder/test_closures.py, which also writes this file.
"""

_NAMES = {
    "builder.stages.calibration": """
        builder.stages.calibration builder.stages.weights graph.insert graph.opset graph.placeholder graph.transpose
        graph.typed graph.upsample precision.activations precision.changes precision.collect precision.nbits
        precision.ranges precision.rounding precision.stored precision.watch precision.weight_only weights.derived
        weights.mapped weights.range_file weights.safetensors
    """,
    "builder.stages.engine": """
        builder.stages.engine builder.stages.weights graph.insert graph.opset graph.placeholder graph.transpose
        graph.typed graph.upsample precision.activations precision.changes precision.nbits precision.ranges
        precision.rounding precision.stored precision.weight_only weights.derived weights.mapped weights.safetensors
    """,
    "builder.stages.graph": """
        builder.stages.graph export.capture graph graph.einsum graph.liveness graph.opset graph.parser_tables
        graph.placeholder graph.promote graph.round_trips graph.simplify graph.typed graph.widen models.component
        signature
    """,
    "builder.stages.merged": """
        builder.stages.merged graph.bucket_choice graph.placeholder graph.profiles
    """,
    "builder.stages.model": """
        builder.stages.model models.single_file models.source sampler.silence weights.mapped
    """,
    "builder.stages.sampler": """
        builder.stages.sampler sampler.accepted sampler.compile sampler.layout sampler.refused sampler.schedulers
        sampler.silence sampler.spec sampler.table sampler.trajectory sampler.verify sampler.webui
    """,
    "builder.stages.tokenizer": """
        builder.stages.tokenizer models.tokenizers
    """,
    "builder.stages.weights": """
        builder.stages.weights graph.insert graph.opset graph.placeholder graph.transpose graph.typed graph.upsample
        precision.activations precision.changes precision.nbits precision.ranges precision.rounding precision.stored
        precision.weight_only weights.derived weights.mapped weights.safetensors
    """,
    "check.gate": """
        bundle.bundle bundle.provenance bundle.signing check.clip check.compare check.components check.feeds check.flip
        check.gate check.measure check.pictures check.reference check.report check.rounding check.step_time check.tables
        cuda.capacity cuda.capturing cuda.driver cuda.graphs cuda.loop cuda.memory cuda.staging engines.backend
        engines.buffers engines.builders engines.cpu engines.device_buffers engines.layers
        engines.onnxruntime.activations engines.onnxruntime.build engines.onnxruntime.device engines.onnxruntime.integer
        engines.onnxruntime.integer_kernels engines.onnxruntime.optimize engines.onnxruntime.order
        engines.onnxruntime.package engines.onnxruntime.prepare engines.onnxruntime.run engines.onnxruntime.session
        engines.onnxruntime_cuda.build engines.onnxruntime_cuda.prepare engines.onnxruntime_cuda.provider
        engines.onnxruntime_cuda.run engines.openvino.build engines.openvino.compiled engines.openvino.device
        engines.openvino.integer engines.openvino.memory engines.openvino.prepare engines.openvino.run engines.runners
        engines.tensorrt.build engines.tensorrt.build_memory engines.tensorrt.build_monitor engines.tensorrt.build_plan
        engines.tensorrt.build_summary engines.tensorrt.builder_process engines.tensorrt.device engines.tensorrt.engine
        engines.tensorrt.inspector engines.tensorrt.layout engines.tensorrt.library engines.tensorrt.network
        engines.tensorrt.open_plan engines.tensorrt.plan_file engines.tensorrt.prepare engines.tensorrt.rtx_runtime
        engines.tensorrt.rtx_targets engines.tensorrt.run engines.tensorrt.runtime_cache engines.tensorrt.timing_cache
        engines.tensorrt_rtx.build engines.tensorrt_rtx.run graph.attention graph.bucket_choice graph.insert
        graph.liveness graph.opset graph.parser_rules graph.parser_tables graph.placeholder graph.profiles
        graph.transpose graph.upsample models.checks models.component models.construct models.denoiser models.flux
        models.flux_components models.flux_step models.hub models.networks models.refusals models.registry models.safety
        models.safety_module models.sd models.sd3 models.sd3_components models.sd3_step models.sd_components
        models.sd_step models.sdxl models.sdxl_components models.sdxl_step models.single_file models.source models.step
        models.text_encoders models.text_module models.tokenizers models.vae models.vae_module precision.activations
        precision.changes precision.nbits precision.ranges precision.rounding precision.stored precision.weight_only
        runtime.engines runtime.habits runtime.lock runtime.loop runtime.noise runtime.observer runtime.pipeline
        runtime.progress runtime.prompt runtime.request runtime.resolve runtime.result runtime.safety runtime.start
        runtime.tables runtime.text sampler.accepted sampler.compile sampler.layout sampler.refused sampler.schedulers
        sampler.silence sampler.spec sampler.table sampler.trajectory sampler.verify sampler.webui signature terminal
        weights.derived weights.external weights.mapped weights.safetensors
    """,
    "engines.onnxruntime.build": """
        engines.cpu engines.onnxruntime.activations engines.onnxruntime.build engines.onnxruntime.device
        engines.onnxruntime.integer engines.onnxruntime.integer_kernels engines.onnxruntime.optimize
        engines.onnxruntime.order engines.onnxruntime.package engines.onnxruntime.prepare engines.onnxruntime.session
        graph.attention graph.insert graph.liveness graph.opset graph.placeholder graph.transpose graph.upsample
        precision.activations precision.changes precision.nbits precision.ranges precision.rounding precision.stored
        precision.weight_only weights.derived weights.external weights.mapped weights.safetensors
    """,
    "engines.onnxruntime.prepare": """
        engines.onnxruntime.integer engines.onnxruntime.prepare graph.insert graph.placeholder graph.transpose
        precision.activations precision.nbits precision.stored
    """,
    "engines.onnxruntime_cuda.build": """
        cuda.driver engines.onnxruntime.integer_kernels engines.onnxruntime.optimize engines.onnxruntime.order
        engines.onnxruntime.package engines.onnxruntime.session engines.onnxruntime_cuda.build
        engines.onnxruntime_cuda.prepare engines.onnxruntime_cuda.provider graph.attention graph.insert graph.opset
        graph.placeholder graph.transpose graph.upsample precision.activations precision.changes precision.nbits
        precision.ranges precision.rounding precision.stored precision.weight_only weights.derived weights.external
        weights.mapped weights.safetensors
    """,
    "engines.onnxruntime_cuda.prepare": """
        engines.onnxruntime_cuda.prepare graph.placeholder graph.transpose
    """,
    "engines.openvino.build": """
        engines.cpu engines.layers engines.openvino.build engines.openvino.compiled engines.openvino.device
        engines.openvino.integer engines.openvino.memory engines.openvino.prepare graph.insert graph.opset
        graph.placeholder graph.transpose graph.upsample precision.activations precision.stored weights.external
        weights.mapped
    """,
    "engines.openvino.prepare": """
        engines.openvino.integer engines.openvino.prepare graph.insert graph.opset graph.placeholder graph.transpose
        graph.upsample precision.activations precision.stored
    """,
    "engines.tensorrt.build": """
        cuda.driver engines.layers engines.tensorrt.build engines.tensorrt.build_memory engines.tensorrt.build_monitor
        engines.tensorrt.build_plan engines.tensorrt.build_summary engines.tensorrt.builder_process
        engines.tensorrt.device engines.tensorrt.inspector engines.tensorrt.layout engines.tensorrt.library
        engines.tensorrt.network engines.tensorrt.plan_file engines.tensorrt.prepare engines.tensorrt.rtx_targets
        engines.tensorrt.timing_cache graph.bucket_choice graph.opset graph.parser_rules graph.parser_tables
        graph.placeholder graph.profiles weights.external weights.mapped
    """,
    "engines.tensorrt.prepare": """
        engines.tensorrt.prepare graph.opset
    """,
    "engines.tensorrt_rtx.build": """
        cuda.driver engines.layers engines.tensorrt.build engines.tensorrt.build_memory engines.tensorrt.build_monitor
        engines.tensorrt.build_plan engines.tensorrt.build_summary engines.tensorrt.builder_process
        engines.tensorrt.device engines.tensorrt.inspector engines.tensorrt.layout engines.tensorrt.library
        engines.tensorrt.network engines.tensorrt.plan_file engines.tensorrt.prepare engines.tensorrt.rtx_targets
        engines.tensorrt.timing_cache engines.tensorrt_rtx.build graph.bucket_choice graph.opset graph.parser_rules
        graph.parser_tables graph.placeholder graph.profiles weights.external weights.mapped
    """,
    "models.flux_components": """
        models.component models.construct models.denoiser models.flux_components models.flux_step models.networks
        models.source models.step models.text_encoders models.text_module models.vae models.vae_module sampler.layout
        signature
    """,
    "models.sd3_components": """
        models.component models.construct models.denoiser models.networks models.sd3_components models.sd3_step
        models.source models.step models.text_encoders models.text_module models.vae models.vae_module sampler.layout
        signature
    """,
    "models.sd_components": """
        models.component models.construct models.denoiser models.networks models.safety models.safety_module
        models.sd_components models.sd_step models.source models.step models.text_encoders models.text_module models.vae
        models.vae_module sampler.layout signature
    """,
    "models.sdxl_components": """
        models.component models.construct models.denoiser models.networks models.sdxl_components models.sdxl_step
        models.source models.step models.text_encoders models.text_module models.vae models.vae_module sampler.layout
        signature
    """,
}
CLOSURES = {entry: tuple(names.split()) for entry, names in _NAMES.items()}
