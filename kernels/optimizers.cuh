// The update rules: one device function each, chosen by RULE_NAME; hyperparameters are macros.
//
// `coefficients` works out, once a step in one thread, what depends on the step (t, from 1, at learning rate lr);
// `rule` updates one parameter and its moments. Formulas are those of gpu_mlp/optimizers.py.

#define COEFFICIENTS 5

__device__ __forceinline__ void average(S& m, S g, S beta) { m += (S(1) - beta) * (g - m); }
__device__ __forceinline__ void average_square(S& v, S g, S beta) { v = beta * v + (S(1) - beta) * g * g; }

// Weight decay: into the gradient, or with DECOUPLED straight off the parameter.
__device__ __forceinline__ void decay(S& theta, S& g, S lr) {
#if DECOUPLED
    theta *= S(1) - lr * S(WEIGHT_DECAY);
#else
    g += S(WEIGHT_DECAY) * theta;
#endif
}

#if defined(RULE_SGD)
__device__ void coefficients(double lr, double t, double* c) {
    c[0] = lr;
    c[1] = t == 1 ? 1 : 1 - DAMPENING;
}
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
#if MOMENTS
    m[0] = S(MOMENTUM) * m[0] + c[1] * g;
    g = NESTEROV ? g + S(MOMENTUM) * m[0] : m[0];
#endif
    theta -= c[0] * g;
}

#elif defined(RULE_ADAM)
__device__ void coefficients(double lr, double t, double* c) {
    double root = sqrt(1 - pow(BETA2, t));
    c[0] = lr;
    c[1] = lr * root / (1 - pow(BETA1, t));
    c[2] = EPSILON_HAT ? EPS : EPS * root;
}
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    average(m[0], g, S(BETA1));
    average_square(m[1], g, S(BETA2));
#if AMSGRAD
    m[2] = smax(m[1], m[2]);
    theta -= c[1] * (m[0] / (M(sqrt)(m[2]) + c[2]));
#else
    theta -= c[1] * (m[0] / (M(sqrt)(m[1]) + c[2]));
#endif
}

#elif defined(RULE_NADAM)
__device__ void coefficients(double lr, double t, double* c) {
    double power = 1, base = pow(0.96, double(MOMENTUM_DECAY)), product = 1, mu = 0;
    for (double i = 1; i <= t && product > 1e-18; ++i) {  // below that, 1 - product is 1
        power *= base;
        mu = BETA1 * (1 - 0.5 * power);
        product *= mu;
    }
    mu = BETA1 * (1 - 0.5 * pow(base, t));
    double next = BETA1 * (1 - 0.5 * pow(base, t + 1)), root = sqrt(1 - pow(BETA2, t));
    c[0] = lr;
    c[1] = lr * (1 - mu) / (1 - product) * root;
    c[2] = lr * next / (1 - product * next) * root;
    c[3] = EPS * root;
}
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    average(m[0], g, S(BETA1));
    average_square(m[1], g, S(BETA2));
    theta -= (c[1] * g + c[2] * m[0]) / (M(sqrt)(m[1]) + c[3]);
}

#elif defined(RULE_RADAM)
__device__ void coefficients(double lr, double t, double* c) {
    double correction = 1 - pow(BETA2, t), limit = 2 / (1 - BETA2) - 1;
    double rho = limit - 2 * t * pow(BETA2, t) / correction;
    c[0] = lr;
    c[1] = lr / (1 - pow(BETA1, t));
    c[2] = rho > 5;
    if (rho > 5) {
        c[1] *= sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) * sqrt(correction);
    }
}
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    average(m[0], g, S(BETA1));
    average_square(m[1], g, S(BETA2));
    theta -= c[1] * (c[2] != S(0) ? m[0] / (M(sqrt)(m[1]) + S(EPS)) : m[0]);
}

#elif defined(RULE_ADAMAX)
__device__ void coefficients(double lr, double t, double* c) {
    c[0] = lr;
    c[1] = lr / (1 - pow(BETA1, t));
}
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    average(m[0], g, S(BETA1));
    m[1] = smax(M(fabs)(g) + S(EPS), S(BETA2) * m[1]);
    theta -= c[1] * (m[0] / m[1]);
}

#elif defined(RULE_ADAGRAD)
__device__ void coefficients(double lr, double t, double* c) { c[0] = lr / (1 + (t - 1) * LR_DECAY); }
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    m[0] += g * g;
    theta -= c[0] * (g / (M(sqrt)(m[0]) + S(EPS)));
}

#elif defined(RULE_RMSPROP)
__device__ void coefficients(double lr, double t, double* c) { c[0] = lr; }
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    average_square(m[0], g, S(ALPHA));
    S variance = m[0];
#if CENTERED
    average(m[1], g, S(ALPHA));
    variance = smax(variance - m[1] * m[1], S(0));
#endif
    S step = g / (M(sqrt)(variance) + S(EPS));
#if HAS_MOMENTUM
    step = m[MOMENTS - 1] = S(MOMENTUM) * m[MOMENTS - 1] + step;
#endif
    theta -= c[0] * step;
}

#elif defined(RULE_ADADELTA)
__device__ void coefficients(double lr, double t, double* c) { c[0] = lr; }
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    average_square(m[0], g, S(RHO));
    g *= M(sqrt)(m[1] + S(EPS)) / M(sqrt)(m[0] + S(EPS));
    average_square(m[1], g, S(RHO));
    theta -= c[0] * g;
}

#elif defined(RULE_LION)
__device__ void coefficients(double lr, double t, double* c) { c[0] = lr; }
__device__ __forceinline__ void rule(S& theta, S g, S* m, const S* c) {
    decay(theta, g, c[0]);
    theta -= c[0] * sign(S(BETA1) * m[0] + (S(1) - S(BETA1)) * g);
    average(m[0], g, S(BETA2));
}
#endif
