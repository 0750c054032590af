// Python's view of attention: addresses and strides in, nothing out.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "attention/attention.hpp"

namespace nb = nanobind;
using namespace dualblade;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

const Kernel& kernel_named(const std::string& name) {
    const Kernel* kernel = find_kernel(name.c_str());
    if (kernel == nullptr) throw std::invalid_argument("no kernel " + name + " on this machine");
    return *kernel;
}

}  // namespace

NB_MODULE(_attention, m) {
    m.attr("BLOCK_TOKENS") = kBlock;
    nb::class_<Run>(m, "Run").def(
        "__init__",
        [](Run* self, std::uintptr_t data, std::int64_t tile_stride, std::int64_t sequence_stride,
           std::int64_t head_stride, std::int64_t row_stride, std::int64_t first_token,
           std::int64_t tokens, std::int64_t tile_rows, std::int64_t first_sequence,
           std::int64_t sequences, std::uintptr_t table) {
            new (self) Run{at<const void>(data),
                           tile_stride,
                           sequence_stride,
                           head_stride,
                           row_stride,
                           first_token,
                           tokens,
                           tile_rows,
                           first_sequence,
                           sequences,
                           at<const std::int32_t>(table)};
        },
        nb::kw_only(), nb::arg("data"), nb::arg("tile_stride"), nb::arg("sequence_stride"),
        nb::arg("head_stride"), nb::arg("row_stride"), nb::arg("first_token"), nb::arg("tokens"),
        nb::arg("tile_rows"), nb::arg("first_sequence"), nb::arg("sequences"), nb::arg("table"));
    nb::class_<Attention>(m, "Attention")
        .def(
            "__init__",
            [](Attention* self, int threads, const std::string& kernel) {
                new (self) Attention(threads, kernel_named(kernel));
            },
            nb::arg("threads"), nb::arg("kernel"))
        .def_prop_ro("kernel",
                     [](const Attention& self) { return std::string(self.kernel_name()); })
        .def(
            "begin",
            [](Attention& self, std::uintptr_t data, std::int64_t sequence_stride,
               std::int64_t head_stride, std::int64_t token_stride, std::int64_t batch,
               std::int64_t kv_heads, std::int64_t group, std::int64_t tokens, std::int64_t key_dim,
               std::int64_t value_dim, std::int64_t past, std::uintptr_t first_visible, float scale,
               bool bfloat16) {
                const Query query{at<const void>(data),
                                  sequence_stride,
                                  head_stride,
                                  token_stride,
                                  batch,
                                  kv_heads,
                                  group,
                                  tokens,
                                  key_dim,
                                  value_dim,
                                  past,
                                  at<const std::int64_t>(first_visible),
                                  scale,
                                  bfloat16 ? Element::kBfloat16 : Element::kFloat32};
                nb::gil_scoped_release released;
                self.begin(query);
            },
            nb::kw_only(), nb::arg("data"), nb::arg("sequence_stride"), nb::arg("head_stride"),
            nb::arg("token_stride"), nb::arg("batch"), nb::arg("kv_heads"), nb::arg("group"),
            nb::arg("tokens"), nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("past"),
            nb::arg("first_visible"), nb::arg("scale"), nb::arg("bfloat16"))
        .def("keys", &Attention::keys, nb::arg("run"), nb::call_guard<nb::gil_scoped_release>())
        .def("values", &Attention::values, nb::arg("run"), nb::call_guard<nb::gil_scoped_release>())
        .def("both", &Attention::both, nb::arg("keys"), nb::arg("values"),
             nb::call_guard<nb::gil_scoped_release>())
        .def(
            "finish",
            [](Attention& self, std::uintptr_t sinks, std::uintptr_t out) {
                self.finish(at<const float>(sinks), at<void>(out));
            },
            nb::arg("sinks"), nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
}
