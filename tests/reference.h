// The definition of each layer: plain loops in double precision, nothing fused, nothing tiled, nothing
// clever. Kernels are judged against these; these are judged against finite differences (test_reference.cpp).
// Shapes are the kernels' own. Gradients of parameters are added to, like the kernels'.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../llmc/params.h"
#include "../llmc/topk.h"

namespace ref {

using Vec = std::vector<double>;

// out [B,T,C] = wte[token] + wpe[position]
inline Vec encoder_forward(const std::vector<int>& tokens, const Vec& wte, const Vec& wpe, int B, int T,
                           int C) {
    Vec out((size_t)B * T * C);
    for (int bt = 0; bt < B * T; bt++)
        for (int c = 0; c < C; c++)
            out[(size_t)bt * C + c] = wte[(size_t)tokens[bt] * C + c] + wpe[bt % T * C + c];
    return out;
}

inline void encoder_backward(double* dwte, double* dwpe, const Vec& dout, const std::vector<int>& tokens,
                             int B, int T, int C) {
    for (int bt = 0; bt < B * T; bt++)
        for (int c = 0; c < C; c++) {
            dwte[(size_t)tokens[bt] * C + c] += dout[(size_t)bt * C + c];
            dwpe[bt % T * C + c] += dout[(size_t)bt * C + c];
        }
}

struct RowStats {
    double mean, rstd;
};
inline RowStats row_stats(const double* x, int C) {
    double mean = 0, var = 0;
    for (int c = 0; c < C; c++) mean += x[c] / C;
    for (int c = 0; c < C; c++) var += (x[c] - mean) * (x[c] - mean) / C;
    return {mean, 1 / std::sqrt(var + 1e-5)};
}

inline Vec layernorm_forward(const Vec& inp, const double* weight, const double* bias, int rows, int C) {
    Vec out((size_t)rows * C);
    for (int n = 0; n < rows; n++) {
        const double* x = &inp[(size_t)n * C];
        const RowStats s = row_stats(x, C);
        for (int c = 0; c < C; c++) out[(size_t)n * C + c] = (x[c] - s.mean) * s.rstd * weight[c] + bias[c];
    }
    return out;
}

// dinp is added to
inline void layernorm_backward(Vec& dinp, double* dweight, double* dbias, const Vec& dout, const Vec& inp,
                               const double* weight, int rows, int C) {
    for (int n = 0; n < rows; n++) {
        const double *x = &inp[(size_t)n * C], *d = &dout[(size_t)n * C];
        const RowStats s = row_stats(x, C);
        double mean_g = 0, mean_gx = 0;
        for (int c = 0; c < C; c++) {
            const double xhat = (x[c] - s.mean) * s.rstd, g = d[c] * weight[c];
            mean_g += g / C;
            mean_gx += g * xhat / C;
            dweight[c] += d[c] * xhat;
            dbias[c] += d[c];
        }
        for (int c = 0; c < C; c++) {
            const double xhat = (x[c] - s.mean) * s.rstd, g = d[c] * weight[c];
            dinp[(size_t)n * C + c] += s.rstd * (g - mean_g - xhat * mean_gx);
        }
    }
}

// out [rows,OC] = inp [rows,IC] weight[OC,IC]^T + bias
inline Vec matmul_forward(const Vec& inp, const double* weight, const double* bias, int rows, int IC,
                          int OC) {
    Vec out((size_t)rows * OC);
    for (int n = 0; n < rows; n++)
        for (int o = 0; o < OC; o++) {
            double sum = bias ? bias[o] : 0;
            for (int i = 0; i < IC; i++) sum += inp[(size_t)n * IC + i] * weight[(size_t)o * IC + i];
            out[(size_t)n * OC + o] = sum;
        }
    return out;
}

// returns dinp
inline Vec matmul_backward(double* dweight, double* dbias, const Vec& dout, const Vec& inp,
                           const double* weight, int rows, int IC, int OC) {
    Vec dinp((size_t)rows * IC);
    for (int n = 0; n < rows; n++)
        for (int o = 0; o < OC; o++) {
            const double d = dout[(size_t)n * OC + o];
            if (dbias) dbias[o] += d;
            for (int i = 0; i < IC; i++) {
                dinp[(size_t)n * IC + i] += d * weight[(size_t)o * IC + i];
                dweight[(size_t)o * IC + i] += d * inp[(size_t)n * IC + i];
            }
        }
    return dinp;
}

inline double gelu(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
inline double gelu_slope(double x) {
    const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), t = std::tanh(u);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

// One attention row: its scores, its softmax, and how much each key belongs to the top k (1 or 0; keys that
// tie for the last places share them).
struct AttentionRow {
    Vec score, p, member;
    double lse, mass;
    double kth = 0, next = 0;  // the k-th and the (k+1)-th largest score, where n > k
};
inline AttentionRow attention_row(const double* qkv, int i, int head, int C, int hs, int k) {
    AttentionRow row;
    const int n = i + 1;
    const double* q = qkv + (size_t)i * 3 * C + head * hs;
    for (int j = 0; j < n; j++) {
        const double* key = qkv + (size_t)j * 3 * C + C + head * hs;
        double dot = 0;
        for (int d = 0; d < hs; d++) dot += q[d] * key[d];
        row.score.push_back(dot / std::sqrt((double)hs));
    }
    const double max = *std::max_element(row.score.begin(), row.score.end());
    double sum = 0;
    for (double s : row.score) sum += std::exp(s - max);
    row.lse = max + std::log(sum);
    for (double s : row.score) row.p.push_back(std::exp(s - row.lse));

    row.member.assign(n, 1);
    row.mass = 1;
    if (k > 0 && n > k) {
        Vec sorted = row.score;
        std::sort(sorted.rbegin(), sorted.rend());
        row.kth = sorted[k - 1];
        row.next = sorted[k];
        const double above =
            (double)(std::lower_bound(sorted.begin(), sorted.end(), row.kth, std::greater<>()) -
                     sorted.begin());
        const double ties = (double)std::count(sorted.begin(), sorted.end(), row.kth);
        row.mass = 0;
        for (int j = 0; j < n; j++) {
            row.member[j] = row.score[j] > row.kth ? 1 : row.score[j] == row.kth ? (k - above) / ties : 0;
            row.mass += row.member[j] * row.p[j];
        }
    }
    return row;
}

// What the regularizer says of a row: f(M), or its entropy.
inline double reg_value(Reg reg, const AttentionRow& row) {
    if (reg == Reg::tail) return 1 - row.mass;
    if (reg == Reg::kl) return -std::log(row.mass);
    double entropy = 0;
    for (double p : row.p) entropy -= p > 0 ? p * std::log(p) : 0;
    return entropy;
}
// Its derivative in p_j, all p being taken as independent: what softmax's backward then goes on from.
inline double reg_slope(Reg reg, const AttentionRow& row, int j) {
    if (reg == Reg::tail) return -row.member[j];
    if (reg == Reg::kl) return -row.member[j] / row.mass;
    return -(row.score[j] - row.lse) - 1;  // -(log p + 1), also where p underflows
}

struct Attention {
    Vec out;                            // [B,T,C]
    Vec lse, mass, kth, next, entropy;  // [B,NH,T]
    double reg_sum = 0;                 // sum of f(M), or of the entropy, over the rows with n > k
};

inline Attention attention_forward(const Vec& qkv, int B, int T, int NH, int hs, int k, Reg reg) {
    const int C = NH * hs;
    Attention a;
    a.out.assign((size_t)B * T * C, 0);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int i = 0; i < T; i++) {
                const double* base = &qkv[(size_t)b * T * 3 * C];
                const AttentionRow row = attention_row(base, i, h, C, hs, k);
                for (int j = 0; j <= i; j++)
                    for (int d = 0; d < hs; d++)
                        a.out[((size_t)b * T + i) * C + h * hs + d] +=
                            row.p[j] * base[(size_t)j * 3 * C + 2 * C + h * hs + d];
                a.lse.push_back(row.lse);
                a.mass.push_back(row.mass);
                a.kth.push_back(row.kth);
                a.next.push_back(row.next);
                a.entropy.push_back(ref::reg_value(Reg::entropy, row));
                if (k > 0 && i + 1 > k) a.reg_sum += ref::reg_value(reg, row);
            }
    return a;
}

// The gradient of <dout, out> + weight * reg_sum, by the chain rule through p. Returns dqkv [B,T,3C].
// stored_out: the forward's output as a bf16 model has it, rounded. It is an input of the kernel's backward,
// which takes sum_j p_ij dp_ij as dout_i . out_i; judging it on the same inputs means using that sum here,
// too.
inline Vec attention_backward(const Vec& dout, const Vec& qkv, int B, int T, int NH, int hs, int k, Reg reg,
                              double weight, const Vec* stored_out = nullptr) {
    const int C = NH * hs;
    Vec dqkv(qkv.size());
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int i = 0; i < T; i++) {
                const double* base = &qkv[(size_t)b * T * 3 * C];
                double* dbase = &dqkv[(size_t)b * T * 3 * C];
                const AttentionRow row = attention_row(base, i, h, C, hs, k);
                const double* d_o = &dout[((size_t)b * T + i) * C + h * hs];
                const bool regularized = k > 0 && i + 1 > k;
                Vec dp(i + 1);
                double p_dp = 0;
                for (int j = 0; j <= i; j++) {
                    const double* v = base + (size_t)j * 3 * C + 2 * C + h * hs;
                    double* dv = dbase + (size_t)j * 3 * C + 2 * C + h * hs;
                    for (int d = 0; d < hs; d++) {
                        dp[j] += d_o[d] * v[d];
                        dv[d] += row.p[j] * d_o[d];
                    }
                    if (!stored_out) p_dp += row.p[j] * dp[j];
                    if (!regularized) continue;
                    const double from_reg = weight * ref::reg_slope(reg, row, j);
                    dp[j] += from_reg;
                    p_dp += row.p[j] * from_reg;
                }
                for (int d = 0; stored_out && d < hs; d++)
                    p_dp += d_o[d] * (*stored_out)[((size_t)b * T + i) * C + h * hs + d];
                for (int j = 0; j <= i; j++) {
                    const double ds = row.p[j] * (dp[j] - p_dp) / std::sqrt((double)hs);
                    for (int d = 0; d < hs; d++) {
                        dbase[(size_t)i * 3 * C + h * hs + d] +=
                            ds * base[(size_t)j * 3 * C + C + h * hs + d];
                        dbase[(size_t)j * 3 * C + C + h * hs + d] +=
                            ds * base[(size_t)i * 3 * C + h * hs + d];
                    }
                }
            }
    return dqkv;
}

// loss [rows]; dlogits [rows,Vp] = gradient of dloss * sum(loss)
struct Classifier {
    Vec loss, dlogits;
};
inline Classifier classifier(const Vec& logits, const std::vector<int>& targets, double dloss, int rows,
                             int V, int Vp) {
    Classifier c{Vec(rows), Vec((size_t)rows * Vp)};
    for (int n = 0; n < rows; n++) {
        const double* x = &logits[(size_t)n * Vp];
        const double max = *std::max_element(x, x + V);
        double sum = 0;
        for (int v = 0; v < V; v++) sum += std::exp(x[v] - max);
        c.loss[n] = max + std::log(sum) - x[targets[n]];
        for (int v = 0; v < V; v++)
            c.dlogits[(size_t)n * Vp + v] = dloss * (std::exp(x[v] - max) / sum - (v == targets[n]));
    }
    return c;
}

// The whole model: losses and, where grads is given, the gradient of
//   mean cross-entropy + (1 / rows) sum over layers of lambda[l] * (sum of f(M) over the layer's rows with n
//   > k), with --reg entropy that of their entropies
// params and grads: num_parameters(config) doubles, laid out by the table of params.h.
struct Loss {
    double ce = 0, reg = 0, total = 0;  // reg: R, every layer counted once
    double mass = 0;                    // mean over the regularized rows
    Vec logits;
};
inline Loss gpt2(const GPT2Config& config, const Vec& params, const std::vector<int>& x,
                 const std::vector<int>& y, int B, int T, int k, Reg reg, const Vec& lambda,
                 Vec* grads = nullptr) {
    const int C = config.channels, NH = config.num_heads, hs = C / NH, L = config.num_layers;
    const int V = config.vocab_size, Vp = config.padded_vocab_size, rows = B * T;
    const std::vector<ParamTensor> table = gpt2_params(config);
    const auto offset_of = [&](const std::string& name) {
        for (const ParamTensor& p : table)
            if (p.name == name) return p.offset;
        throw std::logic_error("no parameter " + name);
    };
    const auto w = [&](const std::string& name) { return &params[offset_of(name)]; };
    const auto g = [&](const std::string& name) { return &(*grads)[offset_of(name)]; };

    struct Layer {
        Vec inp, ln1, qkv, att, mid, ln2, fch, act;
    };
    std::vector<Layer> layers(L);
    Loss loss;
    const Vec wte(params.begin() + offset_of("wte.weight"),
                  params.begin() + offset_of("wte.weight") + (size_t)Vp * C);
    const Vec wpe(w("wpe.weight"), w("wpe.weight") + (size_t)config.max_seq_len * C);
    Vec residual = encoder_forward(x, wte, wpe, B, T, C);
    const double reg_rows = (double)regularized_rows(B, T, NH, k) * L;
    double mass_sum = 0;
    for (int l = 0; l < L; l++) {
        const std::string h = "h." + std::to_string(l) + ".";
        Layer& a = layers[l];
        a.inp = residual;
        a.ln1 = layernorm_forward(a.inp, w(h + "ln_1.weight"), w(h + "ln_1.bias"), rows, C);
        a.qkv = matmul_forward(a.ln1, w(h + "attn.c_attn.weight"), w(h + "attn.c_attn.bias"), rows, C, 3 * C);
        const Attention att = attention_forward(a.qkv, B, T, NH, hs, k, reg);
        a.att = att.out;
        if (k > 0 && reg_rows > 0) {
            loss.reg += att.reg_sum / reg_rows;
            loss.total += lambda[l] * att.reg_sum / reg_rows;
            for (int row = 0; row < B * NH * T; row++)
                if (row % T + 1 > k) mass_sum += att.mass[row];
        }
        a.mid = matmul_forward(a.att, w(h + "attn.c_proj.weight"), w(h + "attn.c_proj.bias"), rows, C, C);
        for (size_t i = 0; i < a.mid.size(); i++) a.mid[i] += a.inp[i];
        a.ln2 = layernorm_forward(a.mid, w(h + "ln_2.weight"), w(h + "ln_2.bias"), rows, C);
        a.fch = matmul_forward(a.ln2, w(h + "mlp.c_fc.weight"), w(h + "mlp.c_fc.bias"), rows, C, 4 * C);
        a.act = a.fch;
        for (double& v : a.act) v = gelu(v);
        residual =
            matmul_forward(a.act, w(h + "mlp.c_proj.weight"), w(h + "mlp.c_proj.bias"), rows, 4 * C, C);
        for (size_t i = 0; i < residual.size(); i++) residual[i] += a.mid[i];
    }
    loss.mass = reg_rows > 0 ? mass_sum / reg_rows : 1;
    const Vec lnf = layernorm_forward(residual, w("ln_f.weight"), w("ln_f.bias"), rows, C);
    loss.logits = matmul_forward(lnf, wte.data(), nullptr, rows, C, Vp);
    const Classifier head = classifier(loss.logits, y, 1.0 / rows, rows, V, Vp);
    for (double v : head.loss) loss.ce += v / rows;
    loss.total += loss.ce;
    if (!grads) return loss;

    grads->assign(params.size(), 0);
    Vec d = matmul_backward(g("wte.weight"), nullptr, head.dlogits, lnf, wte.data(), rows, C, Vp);
    Vec dres(residual.size());
    layernorm_backward(dres, g("ln_f.weight"), g("ln_f.bias"), d, residual, w("ln_f.weight"), rows, C);
    for (int l = L - 1; l >= 0; l--) {
        const std::string h = "h." + std::to_string(l) + ".";
        const Layer& a = layers[l];
        d = matmul_backward(g(h + "mlp.c_proj.weight"), g(h + "mlp.c_proj.bias"), dres, a.act,
                            w(h + "mlp.c_proj.weight"), rows, 4 * C, C);
        for (size_t i = 0; i < d.size(); i++) d[i] *= gelu_slope(a.fch[i]);
        d = matmul_backward(g(h + "mlp.c_fc.weight"), g(h + "mlp.c_fc.bias"), d, a.ln2,
                            w(h + "mlp.c_fc.weight"), rows, C, 4 * C);
        layernorm_backward(dres, g(h + "ln_2.weight"), g(h + "ln_2.bias"), d, a.mid, w(h + "ln_2.weight"),
                           rows, C);
        d = matmul_backward(g(h + "attn.c_proj.weight"), g(h + "attn.c_proj.bias"), dres, a.att,
                            w(h + "attn.c_proj.weight"), rows, C, C);
        d = attention_backward(d, a.qkv, B, T, NH, hs, k, reg, reg_rows > 0 ? lambda[l] / reg_rows : 0);
        d = matmul_backward(g(h + "attn.c_attn.weight"), g(h + "attn.c_attn.bias"), d, a.ln1,
                            w(h + "attn.c_attn.weight"), rows, C, 3 * C);
        layernorm_backward(dres, g(h + "ln_1.weight"), g(h + "ln_1.bias"), d, a.inp, w(h + "ln_1.weight"),
                           rows, C);
    }
    encoder_backward(g("wte.weight"), g("wpe.weight"), dres, x, B, T, C);
    return loss;
}

}  // namespace ref
