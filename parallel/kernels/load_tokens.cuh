  // Included in the kernels of w4a16.cu and w8a16.cu: what lane (g, c) multiplies of X. As a function it is compiled to more
  // instructions.
  //
  // Where they fit into registers, the activations of a whole unit are on their way while its weights are waited for.
  constexpr bool early = NT <= 2;
  uint4 tokens[early ? 4 : 1][NT];
  auto load_tokens = [&](int unit, int quarter) {
#pragma unroll
    for (int t = 0; t < NT; t++) {
      const int m = t * 8 + g;
      tokens[early ? quarter : 0][t] = make_uint4(0, 0, 0, 0);
      if (m < num_rows)
        tokens[early ? quarter : 0][t] =
            load_fresh((const uint4*)(x + (size_t)m * num_in + unit * 128 + quarter * 32 + c * 8));
    }
  };
