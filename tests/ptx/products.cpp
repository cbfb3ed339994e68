// The rules of wgmma, whose products run while their warps go on (PTX ISA, "Asynchronous warpgroup level
// matrix instructions"). Here they are done at once, so that breaking a rule would change nothing; instead it
// is found out:
//
//   - wgmma.fence stands between any use of a register and a product that has it as a sum or an operand, and
//     before the first product; from one product to the next a sum needs none
//   - until a product's group was committed and waited for, its sums may neither be read nor written, nor its
//     operands, in registers or shared memory, be written
//   - what was written to shared memory is read by products after the writing thread's fence.proxy.async
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

void add_slots(std::vector<int>& slots, const Operand& o) {
    if (o.slot >= 0) slots.push_back(o.slot);
    for (const Operand& part : o.parts) add_slots(slots, part);
}

}  // namespace

void note_registers(Instruction& in) {
    const std::string word = in.op.substr(0, in.op.find('.'));
    const bool has_result = word != "st" && word != "red" && word != "cp" && in.flow != Flow::branch &&
                            in.op != "bar.sync" && in.op != "bar.warp.sync" && in.op != "mbarrier.init";
    if (in.guard >= 0) in.reads.push_back(in.guard);
    for (size_t i = 0; i < in.o.size(); i++) add_slots(i == 0 && has_result ? in.writes : in.reads, in.o[i]);
    if (!in.o.empty() && in.o[0].predicate >= 0) in.writes.push_back(in.o[0].predicate);
}

void prepare_products(Block& b) {
    if (!b.kernel->has_products) return;
    b.being_read.assign(b.shared.size() / 4 + 1, 0);
    b.unfenced.assign(b.shared.size() / 4 + 1, 0);
}
void prepare_products(Warp& w, const Kernel& kernel) {
    if (!kernel.has_products) return;
    w.products.reading.assign(kernel.registers, 0);
    w.products.writing.assign(kernel.registers, 0);
    w.products.touched.assign(kernel.registers, 0);
}

void check_registers(Warp& w, const Instruction& in) {
    Products& p = w.products;
    for (const int slot : in.reads) {
        if (p.writing[slot]) fail("it reads a sum of a product that was not waited for");
        p.touched[slot] = p.fences;
    }
    for (const int slot : in.writes) {
        if (p.writing[slot] || p.reading[slot])
            fail("it writes to a register of a product that was not waited for");
        p.touched[slot] = p.fences;
    }
}

void begin_product(Block& b, Warp& w, Product product) {
    Products& p = w.products;
    if (p.fences == 0) fail("no wgmma.fence stands before the first product");
    const auto check_untouched = [&](int slot) {
        if (p.touched[slot] == p.fences)
            fail("a register of the product was in use, and no wgmma.fence came after it");
    };
    for (const int slot : product.fragments) {
        check_untouched(slot);
        if (p.writing[slot]) fail("an operand is the sum of a product that was not waited for");
        p.reading[slot]++;
    }
    for (const int slot : product.sums) {
        check_untouched(slot);
        p.writing[slot]++;
    }
    for (const uint32_t word : product.words) b.being_read[word]++;
    p.open.push_back(std::move(product));
    p.under_way++;
}
void commit_products(Warp& w) {
    w.products.groups.push_back(std::move(w.products.open));
    w.products.open.clear();
}
void wait_products(Block& b, Warp& w, size_t groups_left) {
    Products& p = w.products;
    for (; p.groups.size() > groups_left; p.groups.pop_front())
        for (const Product& product : p.groups.front()) {
            for (const int slot : product.fragments) p.reading[slot]--;
            for (const int slot : product.sums) p.writing[slot]--;
            for (const uint32_t word : product.words) b.being_read[word]--;
            p.under_way--;
        }
}
void fence_registers(Warp& w) {
    w.products.fences++;
}

void note_write(Block& b, Warp& w, int lane, const uint8_t* at, int bytes) {
    if (!b.kernel->has_products || at < b.shared.data() || at >= b.shared.data() + b.shared.size()) return;
    const auto first = (size_t)(at - b.shared.data());
    for (size_t word = first / 4; word * 4 < first + bytes; word++) {
        if (b.being_read[word]) fail("lane %d overwrites what a product reads that was not waited for", lane);
        b.unfenced[word] = (uint16_t)(32 * w.number + lane + 1);
        w.products.unfenced[lane].push_back((uint32_t)word);
    }
}
void fence_writes(Block& b, Warp& w, uint32_t lanes) {
    if (!b.kernel->has_products) return;
    for (int lane = 0; lane < 32; lane++)
        if (lanes >> lane & 1) {
            for (const uint32_t word : w.products.unfenced[lane])
                if (b.unfenced[word] == 32 * w.number + lane + 1) b.unfenced[word] = 0;
            w.products.unfenced[lane].clear();
        }
}
void check_fenced(const Block& b, uint32_t word) {
    if (const int thread = b.unfenced[word])
        fail("a product reads what thread %d wrote, without fence.proxy.async behind it", thread - 1);
}

}  // namespace ptx
