// The simulated device as torch sees it: guard, allocators, hooks, operators, and the module for Python.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_copy_from_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "engine.h"
#include "races.h"

namespace {

namespace py = pybind11;
constexpr auto kSim = c10::DeviceType::PrivateUse1;

thread_local int current_stream = sim::kDefaultStream;
thread_local bool computing = false;  // within the fallback, whose copies are no copies over the bus
thread_local const char* operation = "";

int number(const c10::Stream& stream) { return static_cast<int>(stream.id()); }

c10::Stream stream_of(int id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kSim, 0), id); }

sim::PointPtr& point_of(void* event) { return *static_cast<sim::PointPtr*>(event); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kSim; }
    c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
    c10::Device getDevice() const override { return c10::Device(kSim, 0); }
    void setDevice(c10::Device device) const override {
        TORCH_CHECK(device.index() <= 0, "sim: there is one device, sim:0, and no ", device);
    }
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }

    c10::Stream getStream(c10::Device) const override { return stream_of(current_stream); }
    c10::Stream getDefaultStream(c10::Device) const override { return stream_of(sim::kDefaultStream); }
    c10::Stream getNewStream(c10::Device, int) const override { return stream_of(sim::next_pool_stream()); }
    c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        return stream_of(std::exchange(current_stream, number(stream)));
    }
    bool queryStream(const c10::Stream& stream) const override { return sim::stream_idle(number(stream)); }
    void synchronizeStream(const c10::Stream& stream) const override { sim::synchronize_stream(number(stream)); }
    void synchronizeDevice(c10::DeviceIndex) const override { sim::synchronize_device(); }

    void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
        if (*event == nullptr) {
            *event = new sim::PointPtr;
        }
        point_of(*event) = sim::record(number(stream));
    }
    void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
        delete static_cast<sim::PointPtr*>(event);
    }
    void block(void* event, const c10::Stream& stream) const override {
        if (event != nullptr) {
            sim::wait_for(number(stream), point_of(event));
        }
    }
    bool queryEvent(void* event) const override { return event == nullptr || sim::reached(point_of(event)); }
    void synchronizeEvent(void* event) const override {
        if (event != nullptr) {
            sim::synchronize(point_of(event));
        }
    }
    double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
        const bool reached = sim::reached(point_of(first)) && sim::reached(point_of(second));
        TORCH_CHECK(reached, "sim: an event is not reached yet");
        return 1000 * (point_of(second)->time - point_of(first)->time);
    }
    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
        if (const sim::BlockPtr block = sim::find(data.get())) {
            sim::use_on(block, number(stream));
        }
    }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void release(void* data) { sim::release(data); }

c10::DataPtr allocated(size_t bytes, bool pinned, c10::Device device) {
    void* const data = bytes == 0 ? nullptr : sim::allocate(bytes, pinned, current_stream);
    return {data, data, data == nullptr ? &c10::detail::deleteNothing : &release, device};
}

template <typename StatsOrStat>
void fill(StatsOrStat& stat, const sim::Memory& memory) {
    stat.current = static_cast<int64_t>(memory.current);
    stat.peak = static_cast<int64_t>(memory.peak);
    stat.allocated = static_cast<int64_t>(memory.allocated);
    stat.freed = static_cast<int64_t>(memory.freed);
}

struct DeviceMemory final : c10::DeviceAllocator {
    c10::DataPtr allocate(size_t bytes) override { return allocated(bytes, false, c10::Device(kSim, 0)); }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {}
    void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
        Guard().recordDataPtrOnStream(data, stream);
    }
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
        c10::CachingDeviceAllocator::DeviceStats stats;
        const sim::Memory memory = sim::memory(false);
        for (auto* bytes :
             {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
            fill((*bytes)[0], memory);
        }
        return stats;
    }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex) override { sim::reset_peak(false); }
};
DeviceMemory device_memory;
REGISTER_ALLOCATOR(kSim, &device_memory);

struct PinnedMemory final : at::HostAllocator {
    c10::DataPtr allocate(size_t bytes) override { return allocated(bytes, true, c10::Device(c10::kCPU)); }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
    bool record_event(void*, void*, c10::Stream) override { return true; }  // queued copies hold their blocks
    void empty_cache() override {}
    at::HostStats get_stats() override { return {}; }
    void reset_accumulated_stats() override {}
    void reset_peak_stats() override { sim::reset_peak(true); }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* data) {
    const sim::BlockPtr block = sim::find(data);
    return block && block->pinned;
}

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    void setCurrentDevice(c10::DeviceIndex index) const override { Guard().setDevice(c10::Device(kSim, index)); }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
    c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
    c10::Device getDeviceFromPtr(void*) const override { return c10::Device(kSim, 0); }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
        sim::drain_stream(current_stream);
        c10::DataPtr data = device_memory.allocate(bytes);
        if (const size_t kept = std::min(bytes, storage.nbytes()); kept > 0) {
            std::memcpy(data.get(), storage.data(), kept);
        }
        storage.set_data_ptr(std::move(data));
        storage.set_nbytes(bytes);
    }
};

// The device's memory is the host's: the same elements as a CPU tensor. It does not keep them alive.
at::Tensor on_host(const at::Tensor& tensor) {
    return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(),
                         at::TensorOptions().dtype(tensor.scalar_type()).device(c10::kCPU));
}

void copy_now(const at::Tensor& to, const at::Tensor& from) {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (to.is_contiguous() && from.is_contiguous() && to.scalar_type() == from.scalar_type()) {
        std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes());
    } else {
        to.copy_(from);
    }
}

void note_access(const at::Tensor& tensor, const sim::BlockPtr& block, bool writes, const char* what) {
    const size_t bytes = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize());
    sim::note_access(current_stream, *block, tensor.const_data_ptr(), bytes, writes, what);
}

// The blocks that a copy uses, and the note that it does.
std::vector<sim::BlockPtr> blocks_of(const at::Tensor& to, const at::Tensor& from, const char* what) {
    std::vector<sim::BlockPtr> blocks;
    for (const at::Tensor* tensor : {&from, &to}) {
        // The CPU's part of an operator may lie in pinned memory, but is no access of the device's.
        if (computing && tensor->is_cpu()) {
            continue;
        }
        if (sim::BlockPtr block = sim::find(tensor->const_data_ptr())) {
            note_access(*tensor, block, tensor == &to, what);
            blocks.push_back(std::move(block));
        }
    }
    return blocks;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
    if (to.numel() == 0) {
        return to;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor from = self.expand_as(to);
    const bool to_device = to.device().type() == kSim;
    const bool from_device = from.device().type() == kSim;
    const at::Tensor target = on_host(to);
    if (!computing) {
        sim::check_not_lost();
    }
    const char* const what = computing      ? operation
                             : !to_device   ? "copy to the host"
                             : !from_device ? "copy to the device"
                                            : "copy";
    sim::Task task;
    task.blocks = blocks_of(to, from, what);
    if (to_device && from_device) {  // a kernel like any other
        task.run = [target, source = on_host(from)] { copy_now(target, source); };
        sim::submit(current_stream, std::move(task), true);
    } else if (computing && to_device) {
        // What was computed is seen when the stream comes to it. The closure owns it, as nobody else will keep it.
        task.run = [target, from] { copy_now(target, from); };
        sim::submit(current_stream, std::move(task), true);
    } else if (computing) {
        copy_now(target, on_host(from));  // the stream was drained
    } else {
        // As CUDA does: a copy is asynchronous if the host's side is pinned and dense, and what is converted is
        // converted on the device.
        const at::Tensor& host = to_device ? from : to;
        const bool converts = to.scalar_type() != from.scalar_type();
        const bool pinned = is_pinned(host.const_data_ptr()) && host.is_contiguous();
        const bool blocking = !(non_blocking && pinned && !(to_device && converts));
        task.run = [target, source = on_host(from)] { copy_now(target, source); };
        sim::submit_copy(to_device ? sim::kToDevice : sim::kToHost, to.nbytes(), current_stream, blocking,
                         std::move(task));
    }
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
    if (self.sizes() != to.sizes()) {
        to.resize_(self.sizes());
    }
    return copy_from(self, to, false);
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
    return at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(size, stride, &device_memory,
                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             c10::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
    TORCH_CHECK(!format || *format == c10::MemoryFormat::Contiguous, "sim: resize_ knows contiguous tensors only");
    at::TensorImpl* const impl = self.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(size);
    const size_t bytes = (impl->storage_offset() + impl->numel()) * impl->itemsize();
    if (impl->numel() > 0 && bytes > self.storage().nbytes()) {
        at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
    }
    return self;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source) {
    const int64_t count = static_cast<int64_t>(source.nbytes() / self.itemsize());
    return at::native::set_storage_cpu_(self, std::move(source), 0, {count}, {});
}

at::Scalar local_scalar(const at::Tensor& self) {
    if (const sim::BlockPtr block = sim::find(self.const_data_ptr())) {
        note_access(self, block, false, "item");
    }
    sim::synchronize_stream(current_stream);
    return on_host(self).item();
}

void record_stream(at::Tensor& self, c10::Stream stream) {
    Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// Every other operator: waits for the current stream, and for no other, and computes on the CPU; the result is
// written by the stream. So an operator whose stream should have waited for another reads what was there before,
// and so does a stream that should have waited for this operator.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    struct Computing {
        const bool outer_computing;
        const char* const outer_operation;
        ~Computing() {
            computing = outer_computing;
            operation = outer_operation;
        }
    };
    sim::drain_stream(current_stream);
    const Computing restored{std::exchange(computing, true), std::exchange(operation, op.schema().name().c_str())};
    at::native::cpu_fallback(op, stack, true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// torch.autocast("sim"): the products in the lower precision, all else as it comes.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
    KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
    KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
    KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
    KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
    KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", local_scalar);
    m.impl("resize_", resize);
    m.impl("record_stream", record_stream);
    m.impl("set_.source_Storage", set_storage);
    m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
    m.impl("as_strided", at::native::as_strided_tensorimpl);
    m.impl("view", at::native::view);
    m.impl("view.dtype", at::native::view_dtype);
    m.impl("unfold", at::native::unfold);
    m.impl("_reshape_alias", at::native::_reshape_alias);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    at::setHostAllocator(kSim, &pinned_memory);
    using Free = py::call_guard<py::gil_scoped_release>;
    m.def("now", &sim::now);
    m.def("set_delay", [](int direction, double seconds, double bytes_per_second, double random_seconds) {
        sim::set_delay(direction, {seconds, bytes_per_second, random_seconds});
    });
    m.def("seed_delays", &sim::seed_delays);
    m.def("set_hold", &sim::set_hold);
    m.def("set_loss", &sim::set_loss);
    m.def("set_pinned_limit", &sim::set_pinned_limit);
    m.def("clear_copies", &sim::clear_copies);
    m.def("copies", [] {
        py::list copies;
        for (const sim::Copy& copy : sim::copies()) {
            copies.append(py::make_tuple(copy.direction, copy.bytes, copy.stream, copy.blocking, copy.delay,
                                         copy.queued, copy.begin, copy.end));
        }
        return copies;
    });
    m.def("races", &sim::races);
    m.def("clear_races", &sim::clear_races);
    m.def("memory", [](bool pinned) {
        const sim::Memory memory = sim::memory(pinned);
        return py::make_tuple(memory.current, memory.peak);
    });
    m.def("reset_peak", &sim::reset_peak);
    m.def("poisoned", &sim::poisoned);
    m.def("shut_down", &sim::shut_down, Free());
}
