extension GuestProgram {
    /// The page the vCPUs share: their counters, and the lines to print.
    func sharedPage(_ parameters: ParameterBlock) -> [UInt8] {
        var page = [UInt8](repeating: 0, count: Int(GuestLayout.pageBytes))
        page.place(GuestLayout.sharedMagic, at: 0)
        page.place(1, at: 8)  // the BSP has arrived
        let tail = ", \(summary(parameters))\n"
        let cpus = parameters.cpus
        let line = "godwit guest \(kind.name): \(cpus) cpu\(cpus == 1 ? "" : "s")\(tail)"
        let shortLine = "\(shortLinePrefix)00 of \(cpus) cpus came up\(tail)"
        page.place(line, at: Int(GuestLayout.line - GuestLayout.shared))
        page.place(shortLine, at: Int(GuestLayout.shortLine - GuestLayout.shared))
        return page
    }

    /// What stands before the two digits of the line printed when vCPUs are missing.
    var shortLinePrefix: String { "godwit guest \(kind.name): only " }

    private func summary(_ parameters: ParameterBlock) -> String {
        let filled = "\(sizeText(parameters.fillPages * GuestLayout.pageBytes)) filled"
        guard kind != .idle else { return filled }
        let working = parameters.mappedPages - parameters.workFirst
        return "\(filled), working set \(sizeText(working * GuestLayout.pageBytes))"
    }
}

/// A size to the nearest MiB, or in KiB if small.
func sizeText(_ bytes: UInt64) -> String {
    bytes != 0 && bytes < 4 << 20 ? "\(bytes >> 10) KiB" : "\((bytes >> 19 + 1) >> 1) MiB"
}

extension [UInt8] {
    /// Write a little-endian word.
    mutating func place(_ word: UInt64, at offset: Int) {
        for byte in 0..<8 {
            self[offset + byte] = UInt8(truncatingIfNeeded: word >> (8 * UInt64(byte)))
        }
    }

    /// Write a text.
    mutating func place(_ text: String, at offset: Int) {
        replaceSubrange(offset..<offset + text.utf8.count, with: text.utf8)
    }
}
